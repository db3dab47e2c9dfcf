"""The harness of ``scripts/stress.py``; its experiments are run by ``stress.py quick``."""

import pytest
from processes import assert_each_refused

from benchmarks.stress import Case, Experiment, run_cases, run_experiment


def test_failures_exceptions_and_no_cases_are_reported(tmp_path, capsys):
    def raising(*_):
        yield Case("one", None, "a")
        yield Case("two", "is lost", "b")
        raise RuntimeError("no compiler")

    row = run_experiment("raising", Experiment(raising, 3, 1), tmp_path / "a", 3, 7)
    printed = capsys.readouterr().out
    assert printed.startswith("raising: two: is lost\n")
    assert "RuntimeError: no compiler" in printed
    assert "raising: 3 cases, 2 failed (1 a, 1 b); " in printed
    expected = {"experiment": "raising", "seed": 7, "cases": 3, "failed": 2, "kinds": "1 a, 1 b"}
    assert row == expected | {"s": row["s"]}
    nothing = Experiment(lambda *_: [], 3, 1)
    assert run_experiment("nothing", nothing, tmp_path / "b", 3, 7)["failed"] == 1


@pytest.mark.parametrize("workers", [1, 3])
def test_cases_follow_from_their_number_and_the_seed(workers):
    def draw(seed):
        cases = run_cases(lambda n, draw: Case(f"{n} {draw.random()}", None), 5, seed, workers)
        return [case.description for case in cases]

    assert draw(1) == draw(1)
    assert not set(draw(1)) & set(draw(2))


def test_says_what_it_can_do():
    names = "there are kill, full_disk, hosts, resume"
    cases = [(words, names) for words in ([], ["kill", "all"], ["unknown"])]
    assert_each_refused("scripts/stress.py", *cases)
