"""The definition of the recurrence: one `jax.lax.scan` step per token.

Per head, with state S in R^{K x V}::

    S_t = diag(exp(log_gate_t)) S_{t-1} + k_t v_t^T
    y_t = S_t^T q_t

(gated linear attention: Yang et al. 2023, arXiv:2312.06635, equation 3.) Every other form
is tested against this one, output, final state and gradients.
"""

from typing import Any

import jax
import jax.numpy as jnp

from simplernn_jax.array_types import HeadState
from simplernn_jax.ops.checks import FLOATING, check_array


def recurrent_step(
    q: jax.Array, k: jax.Array, v: jax.Array, log_gate: jax.Array, state: HeadState
) -> tuple[jax.Array, HeadState]:
    """One token of the recurrence.

    Args:
      q: ``[B, H, K]``.
      k: ``[B, H, K]``.
      v: ``[B, H, V]``.
      log_gate: ``[B, H, K]``, at most 0.
      state: ``[B, H, K, V]``, float32 (float64 under x64).

    Returns:
      The output ``[B, H, V]`` in the dtype of v, and the next state in the dtype of `state`.

    Raises:
      ValueError: wrong ranks, or shapes that do not fit together.
      TypeError: wrong dtypes.
    """
    sizes = check_array("q", q, "B H K")
    check_array("k", k, "B H K", FLOATING, sizes)
    sizes = check_array("v", v, "B H V", FLOATING, sizes)
    check_array("log_gate", log_gate, "B H K", FLOATING, sizes)
    check_array("state", state, "B H K V", FLOATING, sizes)
    dtype = state.dtype
    gate = jnp.exp(log_gate.astype(dtype))
    state = gate[..., None] * state + k.astype(dtype)[..., None] * v.astype(dtype)[..., None, :]
    output = jnp.sum(q.astype(dtype)[..., None] * state, axis=-2)
    return output.astype(v.dtype), state


def scan(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_gate: jax.Array,
    initial_state: HeadState,
    clear: jax.Array | None,
) -> tuple[jax.Array, HeadState]:
    """The recurrence over ``[B, T, H, .]``; `clear` ``[B, T]`` empties the state before t."""

    def step(state: HeadState, inputs: Any) -> tuple[HeadState, jax.Array]:
        q, k, v, log_gate, clear_now = inputs
        if clear_now is not None:
            state = jnp.where(clear_now[:, None, None, None], 0, state)
        output, state = recurrent_step(q, k, v, log_gate, state)
        return state, output

    time_first = [x if x is None else jnp.moveaxis(x, 1, 0) for x in (q, k, v, log_gate, clear)]
    final_state, output = jax.lax.scan(step, initial_state, tuple(time_first))
    return jnp.moveaxis(output, 0, 1), final_state
