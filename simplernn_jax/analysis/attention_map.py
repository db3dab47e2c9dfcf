"""The implicit attention of a recurrence: which earlier token each output is made of, exactly.

Unrolled, the recurrence ``S_t = diag(g_t) S_{t-1} + k_t v_t^T, y_t = S_t^T q_t`` is ::

    y_t = (q_t prod_{s<=t} g_s)^T S_0 + sum_{j<=t} A_tj v_j
    A_tj = sum_K q_t k_j prod_{j<s<=t} g_s

(gated linear attention: Yang et al. 2023, arXiv:2312.06635, section 4.1). The products of gates
are formed as in `simplernn_jax.ops.intra_chunk`, where no factor overflows and nothing cancels.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from simplernn_jax.array_types import HeadState, Keys, LogGates, Queries, SegmentIds, Values
from simplernn_jax.ops.intra_chunk import BLOCK, join_blocks


class AttentionMap(NamedTuple):
    """The weights of every output; float32 (float64 if an input is)."""

    weights: jax.Array
    """``[B, H, T, T]``: A_tj at row t, column j; 0 for j > t and between segments."""
    state_queries: jax.Array
    """``[B, T, H, K]``: q_t times all gates so far, which reads the initial state; 0 from the
    first boundary of segments on."""


def attention_map(
    q: Queries, k: Keys, log_gate: LogGates, *, segment_ids: SegmentIds | None = None
) -> AttentionMap:
    """The implicit attention of ``gated_linear_recurrence(q, k, v, log_gate)``, for any v.

    Memory grows with T^2: give it a stretch of a long text, and the state before that.

    Args:
      q: queries ``[B, T, H, K]``.
      k: keys ``[B, T, H, K]``.
      log_gate: ``[B, T, H, K]``, at most 0.
      segment_ids: ``[B, T]``; a change of id clears the state.
    """
    batch, length, heads, key_dim = q.shape
    dtype = jnp.result_type(q, k, log_gate, jnp.float32)
    size = max(BLOCK, 1 << max(length - 1, 0).bit_length())
    boundaries = jnp.zeros((batch, length), bool)
    if segment_ids is not None:
        changed = segment_ids[:, 1:] != segment_ids[:, :-1]
        boundaries = jnp.pad(changed, ((0, 0), (1, 0)))
    log_gate = jnp.where(boundaries[..., None, None], 0, log_gate)

    def rows(x: jax.Array) -> jax.Array:
        """``[B, T, H, K]`` as ``[B * H, size, K]``; zeros fill the end."""
        x = jnp.pad(x.astype(dtype), ((0, 0), (0, size - length), (0, 0), (0, 0)))
        return jnp.moveaxis(x, 2, 1).reshape(-1, size, key_dim)

    levels = join_blocks(rows(q), rows(k), rows(log_gate))
    weights = levels.attention[:, :length, :length].reshape(batch, heads, length, length)
    state_queries = levels.decayed_q[:, :length].reshape(batch, heads, length, key_dim)
    segment = jnp.cumsum(boundaries, axis=1)
    same = segment[:, :, None] == segment[:, None, :]
    weights = jnp.where(same[:, None], weights, 0)
    state_queries = jnp.where((segment == 0)[:, None, :, None], state_queries, 0)
    return AttentionMap(weights, jnp.moveaxis(state_queries, 1, 2))


def read_values(
    attention: AttentionMap, v: Values, initial_state: HeadState
) -> tuple[Values, Values]:
    """What the map makes of the values, and what it makes of the initial state.

    Returns:
      Two ``[B, T, H, V]``; their sum is the output of the recurrence.
    """
    dtype = attention.weights.dtype
    from_values = jnp.einsum("bhts,bshv->bthv", attention.weights, v.astype(dtype))
    state = initial_state.astype(dtype)
    return from_values, jnp.einsum("bthk,bhkv->bthv", attention.state_queries, state)
