"""The recurrence on a CPU: one compiled C function forward and one backward (`fused.c`).

Chunks gain nothing on a CPU without matrix units such as AMX, whose caches hold the state: their
cost (decays at every level, masks, copies) is most of the time there. Token by token, each entry of
the state takes two fused multiply-adds and one multiplication. Only the inputs are residuals; the
gradient recomputes the states.
"""

import jax
import jax.numpy as jnp

from simplernn_jax.array_types import RecurrentState
from simplernn_jax.ops.gated_linear_recurrence.scan import RecurrenceInputs
from simplernn_jax.ops.native import RECURRENCE_BACKWARD, RECURRENCE_FORWARD, call_native, or_empty


def fused(inputs: RecurrenceInputs) -> tuple[jax.Array, RecurrentState]:
    """Compute `scan` in one C call; float32, ``[..., T, H, K]``: `vmap` adds leading axes."""
    output, state = call_native(RECURRENCE_FORWARD, [inputs.v, inputs.state], *_arguments(inputs))
    return output, state


def fused_gradient(
    inputs: RecurrenceInputs, d_output: jax.Array, d_final_state: jax.Array
) -> tuple[jax.Array, ...]:
    """Compute the gradients of q, k, v, log_gate and the initial state, as `fused`."""
    arguments = (*_arguments(inputs), d_output, d_final_state)
    return tuple(call_native(RECURRENCE_BACKWARD, inputs[:5], *arguments))


def _arguments(inputs: RecurrenceInputs) -> list[jax.Array]:
    q, k, v, log_gate, state, reset = inputs
    reset = or_empty(reset, state)
    return [q, k, v, jnp.exp(log_gate), state, reset]
