"""Attention to earlier shards of sequences that are sharded over the mesh axis ``sequence``.

Keys and values move, queries stay. A query attends to up to `context` tokens, so a device needs the
keys and values of the ``context - 1`` tokens before its shard: K + V numbers per head and token,
where the recurrence sends K (V + 1) numbers for all tokens together (`sequence_parallel`). If a
shard is at least as long, the previous device sends them; else all devices gather the whole
sequence. Keys are already rotated by their position in their segment, which `segment_offset`
counts. Unsharded sequences exchange nothing.
"""

from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from simplernn_jax.array_types import SegmentIds
from simplernn_jax.ops.collectives import all_gather, axis_index, axis_size, broadcast_from_last
from simplernn_jax.ops.sequence_parallel import AXIS, halo

_Tree = TypeVar("_Tree")


def segment_offset(
    length: int, initial: Int[Array, "B"] | None, ids: SegmentIds | None
) -> Int[Array, "B"] | None:
    """Count the tokens before this device's shard in the segment of its first token.

    Args:
      length: tokens of a shard.
      initial: tokens of the first segment that precede the sequence; None is 0.
      ids: as `sequence_parallel.shard_segment_ids` returns them; None if all is one segment.

    Returns:
      ``[B]`` int32, or ``[1]`` if equal for all sequences; `initial` if they are not sharded.
    """
    if axis_size(AXIS) == 1:
        return initial
    initial = jnp.zeros(1, jnp.int32) if initial is None else initial
    index = axis_index(AXIS)
    if ids is None:
        return initial + index * length
    # Tokens of each shard's last segment: all, or, with a negative sign, those since its start.
    last_segment = jnp.sum(ids == ids[:, -1:], axis=1, dtype=jnp.int32)
    counts = jnp.where(ids[:, -1] == 0, length, -last_segment)
    counts = all_gather(counts[:, None], AXIS, 1, after=ids)
    shards = jnp.arange(counts.shape[1], dtype=jnp.int32)[None]
    start = jnp.max(jnp.where((counts < 0) & (shards < index), shards, -1), axis=1)
    in_start = -jnp.take_along_axis(counts, jnp.maximum(start, 0)[:, None], axis=1)[:, 0]
    in_start = jnp.where(start < 0, initial, in_start)
    return jnp.where(ids[:, 0] == 0, in_start + (index - 1 - start) * length, 0)


def receive_past(local: jax.Array, initial: jax.Array | None, context: int) -> jax.Array | None:
    """Receive the keys or values before this device's shard that its queries may attend to.

    Args:
      local: those of this shard, ``[B, T / sequence, H, K or V]``.
      initial: ``[B, context - 1, H, K or V]`` before the sequence's first token, or None.
      context: size of the sliding window.

    Returns:
      ``[B, P, H, K or V]``, oldest first, undefined before the first token; `initial` if the
      sequences are not sharded. P is context - 1, or the number of tokens before a sequence's last
      shard if that is less and `initial` is None.
    """
    if axis_size(AXIS) == 1:
        return initial
    batch, length, *channels = local.shape
    if initial is None:
        past = min(context - 1, (axis_size(AXIS) - 1) * length)
        initial = jnp.zeros((batch, past, *channels), local.dtype)
    past = initial.shape[1]
    if past <= length:
        return halo(local[:, length - past :], initial, None)
    whole = jnp.concatenate([initial, all_gather(local, AXIS, 1, after=local)], axis=1)
    return jax.lax.dynamic_slice_in_dim(whole, axis_index(AXIS) * length, past, axis=1)


def from_last_shard(tree: _Tree) -> _Tree:
    """Broadcast the last shard's arrays to all devices."""
    return jax.tree.map(lambda leaf: broadcast_from_last(leaf, AXIS), tree)
