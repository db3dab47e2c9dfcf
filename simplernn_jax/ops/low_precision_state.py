"""The recurrence with a state that is stored in fewer bits than its sums have."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from simplernn_jax.array_types import HeadState
from simplernn_jax.ops.checks import accumulator_dtype
from simplernn_jax.ops.scan import Inputs

CHUNK = 64
"""Tokens between two roundings of the state."""


def low_precision_recurrence(
    recurrence: Callable[[Inputs], tuple[jax.Array, HeadState]], inputs: Inputs, dtype: Any
) -> tuple[jax.Array, HeadState]:
    """Compute `recurrence`, rounding the state to `dtype` every `CHUNK` tokens and at the end.

    Chunks are counted from the first token of the call: one call per token rounds at each, as a
    decoder does that keeps its state in `dtype` between tokens. Inside a chunk sums are float32.
    Gradients of the state are rounded where it is.
    """
    sums = accumulator_dtype(dtype)

    def step(state: HeadState, part: Inputs) -> tuple[HeadState, jax.Array]:
        output, state = recurrence(part._replace(state=state.astype(sums)))
        return state.astype(dtype), output

    batch, length = inputs.q.shape[:2]
    whole = length - length % CHUNK
    state, outputs = inputs.state.astype(dtype), []
    if whole:
        chunks = inputs.map_time(lambda x: _in_chunks(x[:, :whole]))
        state, output = jax.lax.scan(step, state, chunks)
        outputs.append(output.swapaxes(0, 1).reshape(batch, whole, *inputs.v.shape[2:]))
    if whole < length:
        state, output = step(state, inputs.map_time(lambda x: x[:, whole:]))
        outputs.append(output)
    return outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=1), state


def _in_chunks(x: jax.Array) -> jax.Array:
    return x.reshape(x.shape[0], -1, CHUNK, *x.shape[2:]).swapaxes(0, 1)
