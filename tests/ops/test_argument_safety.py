"""No call crashes the process: hundreds of the C functions, each an exception or a result.

`WRONG_CALLS=10` makes ten times as many. wrong_calls.py makes the calls in another process.
"""

import json
import os

import jax.numpy as jnp
import pytest
from processes import run_python

from simplernn_jax.ops import gated_linear_recurrence
from simplernn_jax.ops.attention import apply_rope, sliding_attention
from simplernn_jax.ops.matmul import fused_matmul
from simplernn_jax.ops.native import has_native_functions
from simplernn_jax.ops.rms_norm import rms_norm_convolution

TIMES = int(os.environ.get("WRONG_CALLS", "1"))


@pytest.mark.slow
@pytest.mark.oldest_python
def test_a_wrong_call_of_a_c_function_is_an_exception():
    if not has_native_functions():
        pytest.skip("no C compiler")
    number = 500 * TIMES
    code, text, errors = run_python("tests/helpers/wrong_calls.py", number, timeout=600 * TIMES)
    assert code == 0, errors[-5000:]
    counts = json.loads(text)
    assert counts["calls"] >= number
    assert number / 4 < counts["rejected"] < number


X = jnp.ones((2, 3, 2, 3))  # B T H K
IDS = jnp.ones((2, 3), int)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gated_linear_recurrence(X, X[:, :2], X, -X), r"k: expected \[B, T, H, K\] with B"),
        (lambda: gated_linear_recurrence(X, X, X[:, :2], -X), r"v: expected \[B, T, H, V\]"),
        (
            lambda: gated_linear_recurrence(X, X, X, -X, initial_state=X[..., :2]),
            r"initial_state: expected \[B, H, K, V\]",
        ),
        (
            lambda: gated_linear_recurrence(X, X, X, -X, segment_ids=IDS[:, :2]),
            r"segment_ids: expected \[B, T\]",
        ),
        (lambda: gated_linear_recurrence(X, X, X, -X, method="fast"), "method='fast'"),
        (lambda: gated_linear_recurrence(X, X, X, -X, chunk_size=24), "chunk_size=24: .* power of"),
        (
            lambda: gated_linear_recurrence(X, X, X, -X, method="scan", chunk_size=16),
            "chunk_size=16: method='scan' has no chunks",
        ),
        (lambda: apply_rope(X, IDS), "x: expected .* with an even K; got K = 3"),
        (lambda: sliding_attention(X, X, X, IDS, 0), "context: expected at least 1"),
        (lambda: sliding_attention(X, X[:, :2], X[:, :2], IDS, 1), "k: expected .* T = 3; got S ="),
        (
            lambda: rms_norm_convolution(jnp.ones((2, 3, 5)), jnp.ones((0, 5)), None, None),
            "weights: expected .* W of at least 1; got W = 0",
        ),
        (lambda: fused_matmul(X, [], None), "kernels: expected at least one; got none"),
    ],
)
def test_an_argument_that_is_wrong_is_named(call, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        call()
