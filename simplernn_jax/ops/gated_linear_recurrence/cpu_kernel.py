"""The recurrence on a CPU: one compiled C function forward and one backward (`fused.c`).

Chunks gain nothing on a CPU without matrix units such as AMX, whose caches hold the state: their
cost (decays at every level, masks, copies) is most of the time there. Token by token, each entry of
the state takes two fused multiply-adds and one multiplication. Only the inputs are residuals; the
gradient recomputes the states.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from simplernn_jax.ops.gated_linear_recurrence.scan import RecurrenceInputs
from simplernn_jax.ops.native import RECURRENCE_BACKWARD, RECURRENCE_FORWARD, call_native, or_empty


def fused(*arrays: jax.Array) -> Sequence[jax.Array]:
    """Compute `scan` of `RecurrenceInputs` in one C call; float32, `vmap` adds leading axes."""
    inputs = RecurrenceInputs(*arrays)
    return call_native(RECURRENCE_FORWARD, [inputs.v, inputs.state], *_arguments(inputs))


def fused_gradient(*arrays: jax.Array) -> Sequence[jax.Array]:
    """Map (inputs, cotangents of the results) to those of the first five inputs, as `fused`."""
    inputs = RecurrenceInputs(*arrays[:-2])
    return call_native(RECURRENCE_BACKWARD, inputs[:5], *_arguments(inputs), *arrays[-2:])


def _arguments(inputs: RecurrenceInputs) -> list[jax.Array]:
    q, k, v, log_gate, state, reset = inputs
    return [q, k, v, jnp.exp(log_gate), state, or_empty(reset, state)]
