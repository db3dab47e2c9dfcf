"""No call ends the process: thousands with wrong arguments, each an exception or a right result.

`WRONG_CALLS=10` makes ten times as many. What is called, and how it is made wrong, is in
wrong_calls.py, which runs in a process of its own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from simplernn_jax.ops.native import has_native_functions

PROGRAM = Path(__file__).with_name("wrong_calls.py")
TIMES = int(os.environ.get("WRONG_CALLS", "1"))


@pytest.mark.parametrize(
    ("kind", "number"), [("operators", 1000), ("models", 250), ("native", 800)]
)
def test_a_wrong_call_is_an_exception(kind, number):
    if kind == "native" and not has_native_functions():
        pytest.skip("no C compiler")
    number *= TIMES
    command = [sys.executable, str(PROGRAM), kind, str(number)]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=600 * TIMES, env=os.environ
    )
    assert done.returncode == 0, done.stderr[-5000:]
    counts = json.loads(done.stdout)
    assert counts["calls"] >= number
    assert number / 4 < counts["refused"] < number
