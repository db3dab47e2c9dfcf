"""The harness of ``scripts/stress.py``; its experiments are run by ``stress.py quick``."""

import pytest
from processes import assert_each_refused

from benchmarks.stress import Case, Experiment, corruption, run_cases, run_experiment
from simplernn_jax.checkpoint import folder


def test_failures_are_reported(tmp_path, capsys):
    def losing(*_):
        return [Case("one", None, "a"), Case("two", "is lost", "b"), Case("three", None, "a")]

    row = run_experiment("losing", Experiment(losing, 3, 1), tmp_path / "losing", 3, 7)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "losing: two: is lost"
    assert lines[1].startswith("losing: 3 cases, 1 failed (2 a, 1 b); ")
    assert row | {"s": 0} == {
        **{"experiment": "losing", "seed": 7},
        **{"cases": 3, "failed": 1, "kinds": "2 a, 1 b", "s": 0},
    }


def test_an_exception_or_no_case_is_a_failure(tmp_path, capsys):
    def raising(*_):
        yield Case("one", None)
        raise RuntimeError("no compiler")

    row = run_experiment("raising", Experiment(raising, 3, 1), tmp_path / "a", 3, 7)
    assert (row["cases"], row["failed"]) == (2, 1)
    assert "RuntimeError: no compiler" in capsys.readouterr().out
    nothing = Experiment(lambda *_: [], 3, 1)
    assert run_experiment("nothing", nothing, tmp_path / "b", 3, 7)["failed"] == 1


@pytest.mark.parametrize("workers", [1, 3])
def test_cases_follow_from_their_number_and_the_seed(workers):
    def draw(seed):
        cases = run_cases(lambda n, draw: Case(f"{n} {draw.random()}", None), 5, seed, workers)
        return [case.description for case in cases]

    assert draw(1) == draw(1)
    assert not set(draw(1)) & set(draw(2))


# Of TensorStore's threads, once Orbax has failed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_corruption_that_nothing_detects_is_found(tmp_path, monkeypatch):
    """Without checksums, parameters that were overwritten are loaded, or Orbax fails in its way."""

    def zero_parameters(folder, draw, top):
        for file in top.rglob("state/**/d/*"):
            file.write_bytes(bytes(file.stat().st_size))
        return "checkpoints/"

    monkeypatch.setattr(folder, "find_corruption", lambda *_: None)
    monkeypatch.setattr(corruption, "corrupt_file", zero_parameters)
    assert None not in [case.problem for case in corruption.corruption(tmp_path, 4, 1)]


def test_says_what_it_can_do():
    names = "there are kill, full_disk, hosts, resume"
    cases = [(words, names) for words in ([], ["kill", "all"], ["unknown"])]
    assert_each_refused("scripts/stress.py", *cases)
