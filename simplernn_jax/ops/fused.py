"""The recurrence on a CPU: one compiled C function forward and one backward (`fused.c`).

Chunks gain nothing on a CPU, whose caches hold the state and which has no wide matrix units: their
cost (decays at every level, masks, copies) is most of the time there. Token by token, each entry of
the state takes three multiply-adds, at the speed of the vector units. Nothing is saved for the
gradient, which recomputes the states.
"""

import jax
import jax.numpy as jnp

from simplernn_jax.array_types import HeadState
from simplernn_jax.ops.native import BACKWARD, FORWARD, call_native, or_empty
from simplernn_jax.ops.scan import Inputs


def fused(inputs: Inputs) -> tuple[jax.Array, HeadState]:
    """Compute `scan` in one C call; float32 arrays, with any number of axes before T."""
    output, state = call_native(FORWARD, [inputs.v, inputs.state], *_arguments(inputs))
    return output, state


def fused_gradient(
    inputs: Inputs, d_output: jax.Array, d_final_state: jax.Array
) -> tuple[jax.Array, ...]:
    """Compute the gradients of q, k, v, log_gate and the initial state in one C call."""
    arguments = (*_arguments(inputs), d_output, d_final_state)
    return tuple(call_native(BACKWARD, inputs[:5], *arguments))


def _arguments(inputs: Inputs) -> list[jax.Array]:
    q, k, v, log_gate, state, reset = inputs
    reset = or_empty(reset, state)
    return [q, k, v, jnp.exp(log_gate), state, reset]
