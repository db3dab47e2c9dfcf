"""A few cases of the experiments of ``scripts/stress.py`` that need no processes of their own.

``stress.py quick`` runs all of them.
"""

import pytest
from processes import ROOT, assert_refused, run_python

from benchmarks.stress.catalog import EXPERIMENTS
from benchmarks.stress.experiment import Case, Experiment, run_experiment, table


@pytest.mark.parametrize("name", ["damage", "stores", "numerics", "non_finite", "fuzz"])
def test_nothing_is_lost(tmp_path, name):
    experiment = EXPERIMENTS[name]
    summary = run_experiment(name, experiment, tmp_path / name, min(2, experiment.quick), 0)
    assert summary.cases > 0
    assert not summary.failures


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
    script = ROOT / "scripts" / "stress.py"
    for words in ([], ["kill", "all"], ["unknown"]):
        assert_refused(run_python(script, *words), "there are kill, signals, hosts, resume")
