"""Attention to earlier shards of sequences that are sharded over the mesh axis ``sequence``.

Queries are not sent. A query sees up to `context` tokens, so a device needs the keys and values of
the ``context - 1`` tokens before its shard: K + V numbers per head and token, where the recurrence
sends K (V + 1) numbers for all tokens together (`sequence_parallel`). If a shard is at least as
long, the previous device sends them; else all devices gather the whole sequence. Keys are already
rotated by their position in their segment, which `tokens_before` counts. Unsharded sequences
exchange nothing.
"""

from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from simplernn_jax.array_types import SegmentIds
from simplernn_jax.ops.collectives import all_gather, axis_index, axis_size, broadcast_from_last
from simplernn_jax.ops.sequence_parallel import AXIS, halo

_Tree = TypeVar("_Tree")


def tokens_before(
    length: int, first: Int[Array, "B"] | None, ids: SegmentIds | None
) -> Int[Array, "B"] | None:
    """Count the tokens before this device's shard that are of its first token's segment.

    Args:
      length: tokens of a shard.
      first: the same before the sequence's first token; None is 0.
      ids: as `sequence_parallel.shard_segment_ids` returns them; None if all is one segment.

    Returns:
      ``[B]`` int32, or ``[1]`` if equal for all sequences; `first` if they are not sharded.
    """
    if axis_size(AXIS) == 1:
        return first
    first = jnp.zeros(1, jnp.int32) if first is None else first
    index = axis_index(AXIS)
    if ids is None:
        return first + index * length
    # Tokens of each shard's last segment: all, or, with a negative sign, those since its start.
    last_segment = jnp.sum(ids == ids[:, -1:], axis=1, dtype=jnp.int32)
    counts = jnp.where(ids[:, -1] == 0, length, -last_segment)
    counts = all_gather(counts[:, None], AXIS, 1, after=ids)
    shards = jnp.arange(counts.shape[1], dtype=jnp.int32)[None]
    start = jnp.max(jnp.where((counts < 0) & (shards < index), shards, -1), axis=1)
    in_start = -jnp.take_along_axis(counts, jnp.maximum(start, 0)[:, None], axis=1)[:, 0]
    in_start = jnp.where(start < 0, first, in_start)
    return jnp.where(ids[:, 0] == 0, in_start + (index - 1 - start) * length, 0)


def seen_before(own: jax.Array, first: jax.Array | None, context: int) -> jax.Array | None:
    """Receive the keys or values before this device's shard that its queries may see.

    Args:
      own: those of this shard, ``[B, T / sequence, H, K or V]``.
      first: ``[B, context - 1, H, K or V]`` before the sequence's first token; None if there are
        none.
      context: maximum number of tokens that a query sees.

    Returns:
      ``[B, P, H, K or V]``, oldest first, undefined before the first token; `first` if the
      sequences are not sharded. P is context - 1, or the number of tokens before a sequence's last
      shard if that is less and `first` is None.
    """
    if axis_size(AXIS) == 1:
        return first
    batch, length, *channels = own.shape
    if first is None:
        past = min(context - 1, (axis_size(AXIS) - 1) * length)
        first = jnp.zeros((batch, past, *channels), own.dtype)
    past = first.shape[1]
    if past <= length:
        return halo(own[:, length - past :], first, None)
    whole = jnp.concatenate([first, all_gather(own, AXIS, 1, after=own)], axis=1)
    return jax.lax.dynamic_slice_in_dim(whole, axis_index(AXIS) * length, past, axis=1)


def last_shard(tree: _Tree) -> _Tree:
    """Broadcast the last shard's arrays to all devices."""
    return jax.tree.map(lambda leaf: broadcast_from_last(leaf, AXIS), tree)
