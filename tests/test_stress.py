"""A few runs of ``scripts/stress.py``; the full numbers are run by hand."""

import pytest
from processes import ROOT, assert_refused, run_python

from benchmarks.stress import EXPERIMENTS


@pytest.mark.parametrize(
    ("name", "count", "summary"),
    [
        ("kill", 2, "inside a save: 2 identical, 0 wrong"),
        ("damage", 7, "7 damages: 7 detected, 7 recovered"),
        ("hosts", 1, "killed 1 runs, 0 inside a save: 1 identical, 0 wrong"),
    ],
)
def test_nothing_is_lost(tmp_path, name, count, summary, capsys):
    code = EXPERIMENTS[name](tmp_path, count)
    output = capsys.readouterr().out
    assert (code, output.splitlines()[-1].endswith(summary)) == (0, True), output


def test_says_what_it_can_do():
    script = ROOT / "scripts" / "stress.py"
    assert_refused(run_python(script, "kill", "damage"), "name one: python scripts/stress.py kill")
