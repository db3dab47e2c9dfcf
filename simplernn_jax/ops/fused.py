"""The recurrence on a CPU as one compiled C function forward and one backward (`fused.c`).

A CPU gains nothing from chunks: it has caches that hold the state and no wide matrix units, and
what chunks cost (decays at every level, masks, copies) is most of their time there. Token by token
each entry of the state takes three multiply-adds, at the speed of the vector units, and nothing
is saved for the gradient: it goes through the tokens again.
"""

import jax
import jax.numpy as jnp

from simplernn_jax.array_types import HeadState
from simplernn_jax.ops.collectives import vary_like
from simplernn_jax.ops.native import BACKWARD, FORWARD


def fused(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_gate: jax.Array,
    initial_state: HeadState,
    clear: jax.Array | None,
) -> tuple[jax.Array, HeadState]:
    """Compute `scan` in one call of C; float32 arrays, with any number of axes before T."""
    inputs = _inputs(q, k, v, log_gate, initial_state, clear)
    results = [jax.typeof(x) for x in (v, initial_state)]
    output, state = jax.ffi.ffi_call(FORWARD, results, vmap_method="broadcast_all")(*inputs)
    return output, state


def fused_gradient(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_gate: jax.Array,
    initial_state: HeadState,
    clear: jax.Array | None,
    d_output: jax.Array,
    d_final_state: jax.Array,
) -> tuple[jax.Array, ...]:
    """Gradients of q, k, v, log_gate and the initial state, in one call of C."""
    inputs = _inputs(q, k, v, log_gate, initial_state, clear)
    results = [jax.typeof(x) for x in (q, k, v, log_gate, initial_state)]
    call = jax.ffi.ffi_call(BACKWARD, results, vmap_method="broadcast_all")
    return tuple(call(*inputs, d_output, d_final_state))


def _inputs(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_gate: jax.Array,
    initial_state: HeadState,
    clear: jax.Array | None,
) -> list[jax.Array]:
    if clear is None:  # no argument of a C function can be left out; this one may be empty
        clear = vary_like(jnp.zeros((0,), bool), initial_state)
    return [q, k, v, jnp.exp(log_gate), initial_state, clear]
