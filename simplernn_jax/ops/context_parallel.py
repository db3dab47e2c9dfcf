"""Attention to earlier shards of sequences that are sharded over the mesh axis ``sequence``.

Queries stay where they are. A query sees up to `context` tokens, so a device needs the keys and
values of the ``context - 1`` tokens before its shard: K + V numbers of each head and token, where
the recurrence sends K (V + 1) numbers for all tokens together (`sequence_parallel`). Where a shard
is at least as long, they are the end of the neighbor's; else all devices gather the whole sequence.
Keys come rotated by their position in their segment, which `tokens_before` counts. On sequences
that are not sharded nothing is exchanged.
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
    """Number of tokens before this device's shard that are of its first token's segment.

    Args:
      length: tokens of a shard.
      first: the same before the sequence's first token; None is 0.
      ids: as `sequence_parallel.shard_segment_ids` returns them; None if all is one segment.

    Returns:
      ``[B]`` int32, or ``[1]`` where all sequences are alike; `first` if they are not sharded.
    """
    if axis_size(AXIS) == 1:
        return first
    first = jnp.zeros(1, jnp.int32) if first is None else first
    place = axis_index(AXIS)
    if ids is None:
        return first + place * length
    # How many tokens each shard adds: all of its own to those before, or, if a segment begins in
    # it, those of the last one; the sign tells which.
    newest = jnp.sum(ids == ids[:, -1:], axis=1, dtype=jnp.int32)
    added = jnp.where(ids[:, -1] == 0, length, -newest)
    added = all_gather(added[:, None], AXIS, 1, after=ids)
    places = jnp.arange(added.shape[1], dtype=jnp.int32)[None]
    begins = jnp.max(jnp.where((added < 0) & (places < place), places, -1), axis=1)
    there = -jnp.take_along_axis(added, jnp.maximum(begins, 0)[:, None], axis=1)[:, 0]
    there = jnp.where(begins < 0, first, there)
    return jnp.where(ids[:, 0] == 0, there + (place - 1 - begins) * length, 0)


def seen_before(own: jax.Array, first: jax.Array | None, context: int) -> jax.Array | None:
    """Keys or values of the tokens before this device's shard that its queries may see.

    Args:
      own: those of this shard, ``[B, T / sequence, H, K or V]``.
      first: ``[B, context - 1, H, K or V]`` before the sequence's first token; None if there are
        none.
      context: tokens that a query sees at most.

    Returns:
      ``[B, P, H, K or V]``, oldest first, anything where there was no token; `first` if the
      sequences are not sharded. P is context - 1, or the tokens before a sequence's last shard if
      these are fewer and `first` is None.
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
    """The last shard's arrays, on all devices."""
    return jax.tree.map(lambda leaf: broadcast_from_last(leaf, AXIS), tree)
