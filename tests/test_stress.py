"""A few runs of ``scripts/stress.py``; the full numbers are run by hand."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run_stress(*arguments: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(ROOT / "scripts" / "stress.py"), *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.splitlines()[-1]


def test_killed_runs_end_as_a_run_left_alone():
    summary = run_stress("kill", "-n", "2", "--seed", "1")
    assert summary.startswith("killed 2 runs")
    assert summary.endswith("2 identical, 0 wrong")


def test_damages_are_detected_and_recovered_from():
    assert run_stress("damage", "-n", "7") == "7 damages: 7 detected, 7 recovered"


def test_a_killed_process_ends_the_others_and_nothing_is_lost():
    summary = run_stress("hosts", "-n", "1")
    assert summary == "killed a process of 1 runs: 1 identical, 0 wrong"


def test_says_what_it_can_do():
    command = [sys.executable, str(ROOT / "scripts" / "stress.py"), "kill", "damage"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "name one: python scripts/stress.py kill" in result.stderr
