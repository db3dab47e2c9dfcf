"""Recurrence, short convolution and attention of sequences sharded over the axis ``sequence``.

Inside `jax.shard_map`, every argument is this device's sequence shard; elsewhere it is the whole
sequence, and nothing is exchanged. Gradients come from differentiating the collectives.

Recurrence: each device runs its shard from a zero state, and the devices exchange decays and final
states: K (V + 1) numbers per head and sequence (`gated_linear_recurrence.sharding`).

Attention: keys and values move, queries stay. A query attends to up to `context` tokens, so a
device needs the keys and values of the ``context - 1`` tokens before its shard: K + V numbers per
head and token. If a shard is at least as long, the previous device sends them; else all devices
gather the whole sequence. Keys are already rotated by their position in their segment, which
`segment_offset` counts.

Documents: `shard_segment_ids` numbers the segments of a shard from 0 if its first token continues
the segment of the token before the shard, else from 1. Only tokens with id 0 read the state before
the shard, so nothing else about boundaries is exchanged.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from simplernn_jax.array_types import (
    Activations,
    ConvState,
    Keys,
    LogGates,
    Queries,
    RecurrentState,
    SegmentIds,
    Values,
)
from simplernn_jax.config import ModelConfig
from simplernn_jax.ops import gated_linear_recurrence
from simplernn_jax.ops.gated_linear_recurrence.sharding import join_shards
from simplernn_jax.ops.rms_norm import rms_norm, rms_norm_convolution
from simplernn_jax.ops.segments import mask_to_last_segment, reset_state, segment_starts
from simplernn_jax.parallel.collectives import (
    all_gather,
    axis_index,
    axis_size,
    broadcast_from_last,
    shift,
)

AXIS = "sequence"


def min_shard_tokens(model: ModelConfig) -> int:
    """Return the fewest tokens per shard: a convolution takes its past inputs from one other."""
    widths = int(model.mixer_options.get("short_convolution", 0)), 4 * model.is_convolved
    return max(*widths, 2) - 1


def shard_segment_ids(segment_ids: SegmentIds) -> SegmentIds:
    """Number the segments of this device's shard; 0 is the segment of the token before it.

    Args:
      segment_ids: ``[B, T / sequence]``, any ids; a change of id begins a segment.

    Returns:
      ``[B, T / sequence]`` int32; `segment_ids` itself if the sequences are not sharded.
    """
    if axis_size(AXIS) == 1:
        return segment_ids
    before = shift(segment_ids[:, -1:], AXIS)
    # Before the sequence's first token is its incoming state, of the same segment.
    before = jnp.where(axis_index(AXIS) == 0, segment_ids[:, :1], before)
    begins = segment_ids != jnp.concatenate([before, segment_ids[:, :-1]], axis=1)
    return jnp.cumsum(begins, axis=1, dtype=jnp.int32)


def sharded_recurrence(
    q: Queries,
    k: Keys,
    v: Values,
    log_gate: LogGates,
    *,
    initial_state: RecurrentState | None = None,
    segment_ids: SegmentIds | None = None,
    method: str = "auto",
) -> tuple[Values, RecurrentState]:
    """Compute `gated_linear_recurrence` of sequences that may be sharded.

    Args:
      q: ``[B, T / sequence, H, K]``.
      k: likewise.
      v: ``[B, T / sequence, H, V]``.
      log_gate: ``[B, T / sequence, H, K]``.
      initial_state: ``[B, H, K, V]`` before the sequence's first token; None starts from zero.
      segment_ids: as `shard_segment_ids` returns them; None if all is one segment.
      method: as in `gated_linear_recurrence`.

    Returns:
      The output of this device's shard, and the state after the sequence's last token, on all
      devices. Raises what `gated_linear_recurrence` does.
    """
    if axis_size(AXIS) == 1:
        return gated_linear_recurrence(
            q, k, v, log_gate, initial_state=initial_state, segment_ids=segment_ids, method=method
        )
    from_zero = gated_linear_recurrence(q, k, v, log_gate, segment_ids=segment_ids, method=method)
    before_reset = None if segment_ids is None else segment_ids == 0
    return join_shards((AXIS,), from_zero, q, log_gate, initial_state, before_reset)


def sharded_convolution(
    x: Activations,
    weights: jax.Array,
    state: ConvState,
    segment_ids: SegmentIds | None,
    *,
    normalize: bool = True,
) -> tuple[Activations, ConvState]:
    """Compute `rms_norm_convolution` of sequences that may be sharded, within segments.

    Args:
      x: ``[B, T / sequence, D]``; a shard has at least W - 1 tokens (`min_shard_tokens`).
      weights: ``[W, D]``.
      state: inputs of the convolution before the sequence's first token, ``[B, W - 1, D]``.
      segment_ids: as `shard_segment_ids` returns them; None if all is one segment.
      normalize: as in `rms_norm_convolution`.

    Returns:
      The output of this device's shard, and the state after the sequence's last token, zero where
      it is not of the last token's segment. Raises what `rms_norm_convolution` does.
    """
    starts = None if segment_ids is None else segment_starts(segment_ids)
    if axis_size(AXIS) > 1:
        own = x[:, x.shape[1] - state.shape[1] :].astype(state.dtype)
        own = rms_norm(own) if normalize else own
        state = halo(mask_to_last_segment(own, starts), state, segment_ids)
    y, recent = rms_norm_convolution(x, weights, state, starts, normalize=normalize)
    return y, broadcast_from_last(mask_to_last_segment(recent, starts), AXIS)


def halo(own: jax.Array, first: jax.Array, ids: SegmentIds | None) -> jax.Array:
    """Exchange halos: receive the end of the shard before, zero where this shard begins a segment.

    Args:
      own: the end of this shard, zero outside of its last segment, ``[B, ...]``.
      first: the same before the sequence's first token.
      ids: as `shard_segment_ids` returns them, or None.
    """
    before = jnp.where(axis_index(AXIS) == 0, first, shift(own, AXIS))
    return before if ids is None else reset_state(before, ids[:, 0] != 0)


def segment_offset(
    length: int, initial: Int[Array, "B"] | None, ids: SegmentIds | None
) -> Int[Array, "B"] | None:
    """Count the tokens before this device's shard in the segment of its first token.

    Args:
      length: tokens of a shard.
      initial: tokens of the first segment that precede the sequence; None is 0.
      ids: as `shard_segment_ids` returns them; None if all is one segment.

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


def left_halo(local: jax.Array, initial: jax.Array | None, context: int) -> jax.Array | None:
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
