"""The recurrence with a state that is stored in fewer bits than its sums have."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from simplernn_jax.array_types import HeadState
from simplernn_jax.ops.checks import check_dtype, check_recurrence

CHUNK = 64
"""Tokens between two roundings of the state."""

Recurrence = Callable[..., tuple[jax.Array, HeadState]]
"""``(q, k, v, log_gate, clear, state) -> (output, state)`` over part of the time; sums, and this
state, are float32."""


def in_narrow_state(
    recurrence: Recurrence,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_gate: jax.Array,
    clear: jax.Array | None,
    initial_state: HeadState,
    dtype: Any,
) -> tuple[jax.Array, HeadState]:
    """`recurrence` whose state is rounded to `dtype` after every `CHUNK` tokens, and at the end.

    Chunks are counted from the first token of the call: a call for each token rounds at each, as
    a decoder does that keeps its state in `dtype` between tokens. Inside a chunk sums are float32.
    Gradients of the state are rounded where it is.

    Args:
      recurrence: the exact one.
      q: ``[B, T, H, K]``, as k and log_gate; v ``[B, T, H, V]``.
      k: likewise.
      v: likewise.
      log_gate: likewise.
      clear: ``[B, T]``, the state is emptied before these tokens; or None.
      initial_state: ``[B, H, K, V]``, of any dtype.
      dtype: of the state.

    Raises:
      ValueError: wrong ranks, or shapes that do not fit together.
      TypeError: wrong dtypes.
    """
    check_recurrence(q, k, v, log_gate, initial_state, None, clear=clear)
    check_dtype("dtype", dtype)
    sums = jnp.promote_types(dtype, jnp.float32)

    def step(state: HeadState, inputs: Any) -> tuple[HeadState, jax.Array]:
        *inputs, clear = inputs
        output, state = recurrence(*inputs, clear, state.astype(sums))
        return state.astype(dtype), output

    arrays = (q, k, v, log_gate, clear)
    length = q.shape[1]
    whole = length - length % CHUNK
    state, outputs = initial_state.astype(dtype), []
    if whole:
        chunks = jax.tree.map(lambda x: _in_chunks(x[:, :whole]), arrays)
        state, output = jax.lax.scan(step, state, chunks)
        outputs.append(output.swapaxes(0, 1).reshape(q.shape[0], whole, *v.shape[2:]))
    if whole < length:
        state, output = step(state, jax.tree.map(lambda x: x[:, whole:], arrays))
        outputs.append(output)
    return outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=1), state


def _in_chunks(x: jax.Array) -> jax.Array:
    return x.reshape(x.shape[0], -1, CHUNK, *x.shape[2:]).swapaxes(0, 1)
