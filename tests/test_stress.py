"""Reports of ``scripts/stress.py``; its experiments are run by ``stress.py quick``."""

from processes import assert_each_refused

from benchmarks.stress.experiment import Case, Experiment, run_experiment, table


def test_failures_are_reported(tmp_path, capsys):
    cases = [Case("one", None, "a"), Case("two", "is lost", "b"), Case("three", None, "a")]
    experiment = Experiment("nothing is lost", lambda *_: iter(cases), 3, 1)
    summary = run_experiment("losing", experiment, tmp_path / "losing", 3, 7)
    assert summary.failures == cases[1:2]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "losing: two: is lost"
    assert lines[1].startswith("losing: 3 cases, 1 failed (2 a, 1 b); ")
    text = table([summary], {"losing": experiment}, 7)
    assert "| `losing` | nothing is lost | 3 | 1 | 0 |" in text
    nothing = Experiment("it runs", lambda *_: iter([]), 1, 1)
    assert run_experiment("nothing", nothing, tmp_path / "nothing", 1, 0).failures


def test_says_what_it_can_do():
    names = "there are kill, signals, hosts, resume"
    cases = [(words, names) for words in ([], ["kill", "all"], ["unknown"])]
    assert_each_refused("scripts/stress.py", *cases)
