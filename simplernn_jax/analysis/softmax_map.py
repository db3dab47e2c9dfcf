"""The attention map of a layer of softmax attention: the weights that its softmax gives."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from simplernn_jax.array_types import Keys, Queries, SegmentIds, Values
from simplernn_jax.models.attention import Attention, KVCache
from simplernn_jax.ops import segment_starts
from simplernn_jax.ops.sliding_attention import apply_rope


class SeenTokens(NamedTuple):
    """What a stretch of text attends with and to; float32 (float64 if an input is)."""

    queries: Queries
    """``[B, T, H, K]``, rotated."""
    keys: Keys
    """``[B, S + T, H, K]``, rotated: those of the cache, slot by slot, then those of T tokens."""
    values: Values
    """``[B, S + T, H, V]``."""
    mask: jax.Array
    """bool ``[B, T, S + T]``, True where the query sees the key."""


def seen_tokens(
    attention: Attention,
    projected: tuple[jax.Array, ...],
    cache: KVCache,
    segment_ids: SegmentIds | None = None,
) -> SeenTokens:
    """Which keys each token sees, by the definition: its segment's last `context` ones.

    Args:
      attention: of one layer.
      projected: its queries, keys and values of T tokens, ``[B, T, H, K or V]``.
      cache: before the first of them.
      segment_ids: ``[B, T]``; a token sees nothing from before a change of id.
    """
    q, k, v = projected
    batch, length = q.shape[:2]
    along = jnp.arange(length, dtype=jnp.int32)[None]
    changed = jnp.zeros((batch, length), bool)
    if segment_ids is not None:
        changed = segment_starts(segment_ids)
    segment = jnp.cumsum(changed, axis=1)
    start = jax.lax.cummax(jnp.where(changed, along, 0), axis=1)
    positions = along - start + jnp.where(segment == 0, cache.length[:, None], 0)
    # Slot s has the newest position of the cache that is s modulo the number of slots.
    slots = jnp.arange(attention.context)[None]
    newest = cache.length[:, None] - 1
    cached = newest - (newest - slots) % attention.context  # negative in an empty slot
    is_cached = (segment == 0)[:, :, None] & (cached >= 0)[:, None, :]
    is_cached &= positions[:, :, None] - cached[:, None, :] < attention.context
    is_own = segment[:, :, None] == segment[:, None, :]
    is_own &= along[:, :, None] >= along[:, None, :]
    is_own &= along[:, :, None] - along[:, None, :] < attention.context
    # Rounded as the layer rounds them; what follows is computed in float32 at least.
    q, k = (apply_rope(x, positions).astype(attention.dtype) for x in (q, k))
    dtype = jnp.promote_types(attention.dtype, jnp.float32)

    def after_cached(slots: jax.Array, own: jax.Array) -> jax.Array:
        parts = [jnp.swapaxes(slots, 1, 2), own.astype(attention.dtype)]
        return jnp.concatenate(parts, axis=1).astype(dtype)

    return SeenTokens(
        q.astype(dtype),
        after_cached(cache.keys, k),
        after_cached(cache.values, v),
        jnp.concatenate([is_cached, is_own], axis=2),
    )


def softmax_map(seen: SeenTokens) -> jax.Array:
    """``[B, H, T, S + T]``: the weight of every key in every output; a row adds up to 1."""
    scores = jnp.einsum("bthk,bshk->bhts", seen.queries, seen.keys)
    scores = scores * seen.queries.shape[-1] ** -0.5
    return jax.nn.softmax(jnp.where(seen.mask[:, None], scores, -jnp.inf), axis=-1)
