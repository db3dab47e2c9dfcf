"""The recurrence on a CPU as one compiled C function forward and one backward (`fused.c`).

A CPU gains nothing from chunks: it has caches that hold the state and no wide matrix units, and
what chunks cost (decays at every level, masks, copies) is most of their time there. Token by token
each entry of the state takes three multiply-adds, at the speed of the vector units, and nothing
is saved for the gradient: it goes through the tokens again.
"""

from typing import Any

import jax
import jax.numpy as jnp

from simplernn_jax.array_types import HeadState
from simplernn_jax.ops.manual_axes import vary_like
from simplernn_jax.ops.native import BACKWARD, FORWARD


def fused(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_gate: jax.Array,
    initial_state: HeadState,
    clear: jax.Array | None,
) -> tuple[jax.Array, HeadState]:
    """`scan` in one call; same arguments and results, float32 sums."""
    dtype = initial_state.dtype
    if clear is None:
        clear = jnp.zeros((0,), bool)
    inputs = [x.astype(dtype) for x in (q, k, v, log_gate)]
    # Inside `shard_map` the two functions take inputs of one type.
    inputs = [vary_like(x, initial_state) for x in inputs]
    output, state = _fused(*inputs, initial_state, vary_like(clear, initial_state))
    return output.astype(v.dtype), state


@jax.custom_vjp
def _fused(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_gate: jax.Array,
    initial_state: HeadState,
    clear: jax.Array,
) -> tuple[jax.Array, HeadState]:
    results = [jax.typeof(x) for x in (v, initial_state)]
    call = jax.ffi.ffi_call(FORWARD, results, vmap_method="broadcast_all")
    output, state = call(q, k, v, jnp.exp(log_gate), initial_state, clear)
    return output, state


def _fused_fwd(*inputs: jax.Array) -> tuple[Any, Any]:
    return _fused(*inputs), inputs


def _fused_bwd(inputs: Any, cotangents: Any) -> tuple[Any, ...]:
    q, k, v, log_gate, initial_state, clear = inputs
    results = [jax.typeof(x) for x in (q, k, v, log_gate, initial_state)]
    call = jax.ffi.ffi_call(BACKWARD, results, vmap_method="broadcast_all")
    gradients = call(q, k, v, jnp.exp(log_gate), initial_state, clear, *cotangents)
    return (*gradients, None)


_fused.defvjp(_fused_fwd, _fused_bwd)
