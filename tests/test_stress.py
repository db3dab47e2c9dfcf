"""A few runs of ``scripts/stress.py``; the full numbers are run by hand."""

import pytest
from processes import ROOT, assert_refused, run_python

SCRIPT = ROOT / "scripts" / "stress.py"


@pytest.mark.parametrize(
    ("arguments", "summary"),
    [
        (("kill", "-n", 2), "inside a save: 2 identical, 0 wrong"),
        (("damage", "-n", 7), "7 damages: 7 detected, 7 recovered"),
        (("hosts", "-n", 1), "killed 1 runs, 0 inside a save: 1 identical, 0 wrong"),
    ],
)
def test_nothing_is_lost(arguments, summary):
    result = run_python(SCRIPT, *arguments, timeout=900)
    assert result.code == 0, result
    assert result.output.splitlines()[-1].endswith(summary)


def test_says_what_it_can_do():
    assert_refused(run_python(SCRIPT, "kill", "damage"), "name one: python scripts/stress.py kill")
