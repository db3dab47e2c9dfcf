"""What attention needs of other devices where stretches of time lie apart, axis ``sequence``.

Queries stay where they are. A query sees up to `context` tokens, so a device needs the keys and
values of the ``context - 1`` tokens before its stretch: K + V numbers of each head and token, where
the recurrence sends K (V + 1) numbers for all tokens together (`parallel.sequence`). Where a
stretch is at least as long as that, they are the end of the neighbour's; else all devices gather
the whole row. Keys come rotated by their place in their segment, which `tokens_before_shard` tells.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from simplernn_jax.array_types import SegmentIds
from simplernn_jax.sharding.collectives import axis_index, axis_size, gather
from simplernn_jax.sharding.sequence_parallel import AXIS, halo


def tokens_before_shard(
    length: int, first: Int[Array, "B"] | None, ids: SegmentIds | None
) -> Int[Array, "B"]:
    """How many tokens of its first token's segment lie before this device's stretch.

    Args:
      length: tokens of a stretch.
      first: as many before the row's first token; None is 0.
      ids: what `sequence.stretch_ids` returned; None if all is one segment.

    Returns:
      ``[B]`` int32, or ``[1]`` where all rows are alike.
    """
    first = jnp.zeros(1, jnp.int32) if first is None else first
    place = axis_index(AXIS)
    if ids is None:
        return first + place * length
    # What each stretch leaves: all of its tokens on top of those before, or, if a segment begins
    # in it, so many of the last one; that is told by the sign.
    newest = jnp.sum(ids == ids[:, -1:], axis=1, dtype=jnp.int32)
    left = jnp.where(ids[:, -1] == 0, length, -newest)
    left = gather(left[:, None], AXIS, 1, after=ids)
    places = jnp.arange(left.shape[1], dtype=jnp.int32)[None]
    begins = jnp.max(jnp.where((left < 0) & (places < place), places, -1), axis=1)
    there = -jnp.take_along_axis(left, jnp.maximum(begins, 0)[:, None], axis=1)[:, 0]
    there = jnp.where(begins < 0, first, there)
    return jnp.where(ids[:, 0] == 0, there + (place - 1 - begins) * length, 0)


def seen_before(own: jax.Array, first: jax.Array | None, context: int) -> jax.Array:
    """Keys or values of the tokens before this device's stretch, as many as its queries may see.

    Args:
      own: of this stretch, ``[B, T / sequence, H, K or V]``.
      first: ``[B, context - 1, H, K or V]`` before the row's first token; None if there are none.
      context: tokens that a query sees at most.

    Returns:
      ``[B, P, H, K or V]``, oldest first; P is context - 1, or what a row has before its last
      stretch if that is less and `first` is None. Anything where no token was.
    """
    batch, length, *channels = own.shape
    if first is None:
        past = min(context - 1, (axis_size(AXIS) - 1) * length)
        first = jnp.zeros((batch, past, *channels), own.dtype)
    past = first.shape[1]
    if past <= length:
        return halo(own[:, length - past :], first, None)
    whole = jnp.concatenate([first, gather(own, AXIS, 1, after=own)], axis=1)
    return jax.lax.dynamic_slice_in_dim(whole, axis_index(AXIS) * length, past, axis=1)
