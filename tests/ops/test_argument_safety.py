"""No call crashes the process: thousands with wrong arguments, each an exception or a right result.

`WRONG_CALLS=10` makes ten times as many. The calls are in wrong_calls.py, which runs in a process
of its own.
"""

import json
import os

import jax.numpy as jnp
import pytest
from flax import nnx
from processes import run_python
from small_runs import small_config

from simplernn_jax.models import SimpleRNN
from simplernn_jax.models.blocks import ResidualBlock
from simplernn_jax.ops import gated_linear_recurrence
from simplernn_jax.ops.attention import apply_rope, sliding_attention
from simplernn_jax.ops.convolution import rms_norm_convolution
from simplernn_jax.ops.matmul import fused_matmul
from simplernn_jax.ops.native import has_native_functions

pytestmark = pytest.mark.oldest_python

TIMES = int(os.environ.get("WRONG_CALLS", "1"))


@pytest.mark.parametrize(("kind", "number"), [("operators", 600), ("models", 150), ("native", 500)])
def test_a_wrong_call_is_an_exception(kind, number):
    if kind == "native" and not has_native_functions():
        pytest.skip("no C compiler")
    number *= TIMES
    code, text, errors = run_python(
        "tests/helpers/wrong_calls.py", kind, number, timeout=600 * TIMES
    )
    assert code == 0, errors[-5000:]
    counts = json.loads(text)
    assert counts["calls"] >= number
    assert number / 4 < counts["refused"] < number


X = jnp.ones((2, 3, 2, 3))  # B T H K


def layer():
    return SimpleRNN(4, 6, 6, 5, 2, output_gate=True, rngs=nnx.Rngs(0))


def block():
    return ResidualBlock(small_config().model, "simple_rnn", rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: gated_linear_recurrence(X, X, X, X, method="scan", chunk_size=16),
            "chunk_size=16: method='scan' has no chunks",
        ),
        (lambda: apply_rope(X, jnp.zeros((2, 3), int)), "x: expected .* with an even K; got K = 3"),
        (
            lambda: sliding_attention(X, X, X, jnp.ones((2, 3), int), 0),
            "context: expected at least 1",
        ),
        (
            lambda: sliding_attention(X, X[:, :2], X[:, :2], jnp.ones((2, 3), int), 1),
            "k: expected .* with S at least T = 3; got S = 2",
        ),
        (
            lambda: rms_norm_convolution(jnp.ones((2, 3, 5)), jnp.ones((0, 5)), None, None),
            "weights: expected .* W of at least 1; got W = 0",
        ),
        (lambda: fused_matmul(X, [], None), "kernels: expected at least one; got none"),
        (
            lambda: layer().cell.project_outputs(X, jnp.ones((7, 6))),
            r"output_gate: expected \[2, 3, 6",
        ),
        (lambda: block()(jnp.ones((2, 3, 8)), ("no state",), None), "state: expected a Residual"),
        (
            lambda: block()(
                jnp.ones((2, 3, 8)), block().initial_state(2)._replace(convolution=1.0), None
            ),
            "got float",
        ),
    ],
)
def test_an_argument_that_is_wrong_is_named(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()
