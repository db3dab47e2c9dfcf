"""The recurrence with a state that is stored in fewer bits than its sums."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from simplernn_jax.array_types import RecurrentState
from simplernn_jax.ops.checks import accumulator_dtype
from simplernn_jax.ops.gated_linear_recurrence.scan import RecurrenceInputs

ROUNDING_INTERVAL = 64
"""Tokens between two roundings of the state."""


def low_precision_recurrence(
    recurrence: Callable[..., tuple[jax.Array, RecurrentState]],
    inputs: RecurrenceInputs,
    dtype: Any,
) -> tuple[jax.Array, RecurrentState]:
    """Round the state to `dtype` every `ROUNDING_INTERVAL` tokens of `recurrence` and at the end.

    Intervals are counted from the first token of the call: calls with one token round after every
    token, as in decoding. Sums are float32 (float64 if `dtype` is). State cotangents are rounded at
    the same positions. Returns the output in the dtype of v, and the final state in `dtype`.
    """
    sums = accumulator_dtype(dtype)

    def step(state: RecurrentState, part: RecurrenceInputs) -> tuple[RecurrentState, jax.Array]:
        output, state = recurrence(part._replace(state=state.astype(sums)))
        return state.astype(dtype), output

    batch, length = inputs.q.shape[:2]
    whole = length - length % ROUNDING_INTERVAL
    state, outputs = inputs.state.astype(dtype), []
    if whole:
        intervals = inputs.map_time(lambda x: _in_intervals(x[:, :whole]))
        state, output = jax.lax.scan(step, state, intervals)
        outputs.append(output.swapaxes(0, 1).reshape(batch, whole, *inputs.v.shape[2:]))
    if whole < length:
        state, output = step(state, inputs.map_time(lambda x: x[:, whole:]))
        outputs.append(output)
    return outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=1), state


def _in_intervals(x: jax.Array) -> jax.Array:
    return x.reshape(x.shape[0], -1, ROUNDING_INTERVAL, *x.shape[2:]).swapaxes(0, 1)
