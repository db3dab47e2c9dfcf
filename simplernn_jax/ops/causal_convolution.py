"""A short causal depthwise convolution of sequences that may be sharded over ``sequence``."""

import jax
import jax.numpy as jnp

from simplernn_jax.array_types import Activations, ConvState, SegmentIds
from simplernn_jax.ops import segment_starts
from simplernn_jax.ops.checks import FLOATING, check_array, check_segment_ids
from simplernn_jax.ops.collectives import axis_size, broadcast_from_last
from simplernn_jax.ops.convolution_sharding import mask_to_last_segment
from simplernn_jax.ops.rms_norm_convolution import sum_of_shifts
from simplernn_jax.ops.sequence_parallel import AXIS, halo


def causal_convolution(
    x: Activations, weights: jax.Array, recent: ConvState, segment_ids: SegmentIds | None
) -> tuple[Activations, ConvState]:
    """Compute ``y_t = sum_i w_i x_{t-i}`` for i in 0 .. W - 1, within segments.

    Args:
      x: ``[B, T / sequence, D]``.
      weights: ``[W, D]``; ``weights[i]`` multiplies the input i tokens earlier.
      recent: inputs before the sequence's first token, of its segment, ``[B, W - 1, D]``.
      segment_ids: as `sequence_parallel.shard_segment_ids` returns them; None if all is one
        segment.

    Returns:
      The output of this device's shard, and the last W - 1 inputs of the whole sequence, zero where
      they are not of the last token's segment; both in the dtype of `recent`.

    Raises:
      ValueError: wrong ranks, or shapes that do not fit together.
      TypeError: wrong dtypes.
    """
    sizes = check_array("x", x, "B T D", FLOATING)
    sizes = check_array("weights", weights, "W D", FLOATING, sizes)
    if sizes["W"] == 0:
        raise ValueError("weights: expected [W, D] with W of at least 1; got W = 0")
    check_array("recent", recent, "B P D", FLOATING, {**sizes, "P": sizes["W"] - 1})
    check_segment_ids(segment_ids, sizes)
    starts = None if segment_ids is None else segment_starts(segment_ids)
    past, x = recent.shape[1], x.astype(recent.dtype)
    if axis_size(AXIS) > 1:
        own = mask_to_last_segment(x[:, x.shape[1] - past :], starts)
        recent = halo(own, recent, segment_ids)
    inputs = jnp.concatenate([recent, x], axis=1)
    y = sum_of_shifts(inputs, weights.astype(x.dtype), starts)
    final = mask_to_last_segment(inputs[:, x.shape[1] :], starts)
    return y, broadcast_from_last(final, AXIS)
