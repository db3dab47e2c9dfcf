"""Attention maps: the weight of every earlier token in every output of a layer.

A recurrence has an exact implicit map. Unrolled, ``S_t = diag(g_t) S_{t-1} + k_t v_t^T,
y_t = S_t^T q_t`` is ::

    y_t = (q_t prod_{s<=t} g_s)^T S_0 + sum_{j<=t} A_tj v_j
    A_tj = sum_K q_t k_j prod_{j<s<=t} g_s

(gated linear attention: Yang et al. 2023, arXiv:2312.06635, section 4.1). The products of gates
are formed as in `ops/gated_linear_recurrence/intra_chunk.py`, where no factor overflows and nothing
cancels. Softmax attention has its weights by definition. Memory grows with T^2: map an excerpt of a
long text, given the state before it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from simplernn_jax.array_types import Keys, LogGates, Queries, RecurrentState, SegmentIds, Values
from simplernn_jax.models.mixers.attention import Attention, KVCache
from simplernn_jax.ops.attention import apply_rope
from simplernn_jax.ops.checks import accumulator_dtype
from simplernn_jax.ops.gated_linear_recurrence.intra_chunk import BLOCK, join_blocks
from simplernn_jax.ops.segments import segment_starts


class AttentionMap(NamedTuple):
    """Weights of every output; float32 (float64 if an input is)."""

    weights: jax.Array
    """``[B, H, T, T]``: A_tj at row t, column j; 0 for j > t and between segments."""
    state_queries: jax.Array
    """``[B, T, H, K]``: q_t times the product of gates 0 .. t, which reads the initial state; 0
    after the first segment boundary."""


def attention_map(
    q: Queries, k: Keys, log_gate: LogGates, *, segment_ids: SegmentIds | None = None
) -> AttentionMap:
    """Return the implicit attention of ``gated_linear_recurrence(q, k, v, log_gate)``, for any v.

    Args:
      q: queries, ``[B, T, H, K]``, float32, float64 or bfloat16.
      k: keys, ``[B, T, H, K]``.
      log_gate: logarithms of the gates, at most 0, ``[B, T, H, K]``.
      segment_ids: int32 ``[B, T]``, as there; None is one segment.
    """
    batch, length, heads, key_dim = q.shape
    dtype = accumulator_dtype(q, k, log_gate)
    size = max(BLOCK, 1 << max(length - 1, 0).bit_length())
    boundaries = _boundaries(segment_ids, batch, length)
    log_gate = jnp.where(boundaries[..., None, None], 0, log_gate)

    def by_head(x: jax.Array) -> jax.Array:
        """``[B, T, H, K]`` as ``[B * H, size, K]``, padded with zeros."""
        x = jnp.pad(x.astype(dtype), ((0, 0), (0, size - length), (0, 0), (0, 0)))
        return jnp.moveaxis(x, 2, 1).reshape(-1, size, key_dim)

    levels = join_blocks(by_head(q), by_head(k), by_head(log_gate))
    weights = levels.attention[:, :length, :length].reshape(batch, heads, length, length)
    state_queries = levels.decayed_q[:, :length].reshape(batch, heads, length, key_dim)
    segment = jnp.cumsum(boundaries, axis=1)
    same = segment[:, :, None] == segment[:, None, :]
    weights = jnp.where(same[:, None], weights, 0)
    state_queries = jnp.where((segment == 0)[:, None, :, None], state_queries, 0)
    return AttentionMap(weights, jnp.moveaxis(state_queries, 1, 2))


def apply_map(
    attention: AttentionMap, v: Values, initial_state: RecurrentState
) -> tuple[Values, Values]:
    """Apply a map to the values and to the initial state.

    Args:
      attention: of `attention_map`.
      v: ``[B, T, H, V]``.
      initial_state: ``[B, H, K, V]``.

    Returns:
      Two ``[B, T, H, V]`` in the map's dtype; their sum is the output of the recurrence.
    """
    dtype = attention.weights.dtype
    from_values = jnp.einsum("bhts,bshv->bthv", attention.weights, v.astype(dtype))
    state = initial_state.astype(dtype)
    return from_values, jnp.einsum("bthk,bhkv->bthv", attention.state_queries, state)


class AttentionInputs(NamedTuple):
    """Inputs of softmax attention over cached and new tokens; float32 (float64 if an input is)."""

    queries: Queries
    """``[B, T, H, K]``, with rotary embedding."""
    keys: Keys
    """``[B, S + T, H, K]``, with rotary embedding: the S slots of the cache, then T new tokens."""
    values: Values
    """``[B, S + T, H, V]``."""
    mask: jax.Array
    """bool ``[B, T, S + T]``, True where the query sees the key."""


def attention_inputs(
    attention: Attention,
    projected: tuple[jax.Array, ...],
    cache: KVCache,
    segment_ids: SegmentIds | None = None,
) -> AttentionInputs:
    """Return what each token attends to, by definition: its segment's last `context` tokens.

    `projected` are queries, keys and values of T tokens, ``[B, T, H, K or V]``; `cache` is that
    before them. A token sees nothing from before a change of `segment_ids` ``[B, T]``.
    """
    q, k, v = projected
    batch, length = q.shape[:2]
    steps = jnp.arange(length, dtype=jnp.int32)[None]
    boundaries = _boundaries(segment_ids, batch, length)
    segment = jnp.cumsum(boundaries, axis=1)
    start = jax.lax.cummax(jnp.where(boundaries, steps, 0), axis=1)
    positions = steps - start + jnp.where(segment == 0, cache.length[:, None], 0)
    # Slot s has the newest position of the cache that is s modulo the number of slots.
    slots = jnp.arange(attention.context, dtype=jnp.int32)[None]
    newest = cache.length[:, None] - 1
    cached = newest - (newest - slots) % attention.context  # negative in an empty slot
    is_cached = (segment == 0)[:, :, None] & (cached >= 0)[:, None, :]
    is_cached &= positions[:, :, None] - cached[:, None, :] < attention.context
    distance = steps[:, :, None] - steps[:, None, :]
    is_new = segment[:, :, None] == segment[:, None, :]
    is_new &= (distance >= 0) & (distance < attention.context)
    # Rounded to the layer's dtype, as in the layer; then computed in float32 at least.
    q, k = (apply_rope(x, positions).astype(attention.dtype) for x in (q, k))
    dtype = accumulator_dtype(attention.dtype)

    def with_cached(slots: jax.Array, new: jax.Array) -> jax.Array:
        parts = [jnp.swapaxes(slots, 1, 2), new.astype(attention.dtype)]
        return jnp.concatenate(parts, axis=1).astype(dtype)

    return AttentionInputs(
        q.astype(dtype),
        with_cached(cache.keys, k),
        with_cached(cache.values, v),
        jnp.concatenate([is_cached, is_new], axis=2),
    )


def softmax_map(inputs: AttentionInputs) -> jax.Array:
    """Return ``[B, H, T, S + T]``: the weight of every key in every output; rows sum to 1."""
    scores = jnp.einsum("bthk,bshk->bhts", inputs.queries, inputs.keys)
    scores = scores * inputs.queries.shape[-1] ** -0.5
    return jax.nn.softmax(jnp.where(inputs.mask[:, None], scores, -jnp.inf), axis=-1)


def _boundaries(segment_ids: SegmentIds | None, batch: int, length: int) -> jax.Array:
    if segment_ids is None:
        return jnp.zeros((batch, length), bool)
    return segment_starts(segment_ids)
