"""No call crashes the process: thousands with wrong arguments, each an exception or a right result.

`WRONG_CALLS=10` makes ten times as many. The calls are in wrong_calls.py, which runs in a process
of its own.
"""

import json
import os

import pytest
from processes import run_python

from simplernn_jax.ops.native import has_native_functions

TIMES = int(os.environ.get("WRONG_CALLS", "1"))


@pytest.mark.parametrize(("kind", "number"), [("operators", 600), ("models", 150), ("native", 500)])
def test_a_wrong_call_is_an_exception(kind, number):
    if kind == "native" and not has_native_functions():
        pytest.skip("no C compiler")
    number *= TIMES
    code, text, errors = run_python("tests/wrong_calls.py", kind, number, timeout=600 * TIMES)
    assert code == 0, errors[-5000:]
    counts = json.loads(text)
    assert counts["calls"] >= number
    assert number / 4 < counts["refused"] < number
