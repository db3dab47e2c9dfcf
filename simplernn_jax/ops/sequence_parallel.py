"""Recurrence and short convolution of sequences that are sharded over the mesh axis ``sequence``.

Inside `jax.shard_map`, every argument is this device's sequence shard; elsewhere it is the whole
sequence, and nothing is exchanged. Each device runs its shard from a zero state (`incoming_state`).
Other devices need its decay D and its final state S from zero: K (V + 1) numbers per head and
sequence, independent of T. Two consecutive shards compose to (D_1 D_2, D_2 S_1 + S_2), which is
associative: n devices know the states before their shards after log2(n) + 1 exchanges. Gradients
come from differentiating `ppermute`.

Documents: `shard_segment_ids` numbers the segments of a shard from 0 if its first token continues
the segment of the token before the shard, else from 1. Only tokens with id 0 read the state before
the shard, so nothing else about boundaries is exchanged.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

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
from simplernn_jax.ops import gated_linear_recurrence, segment_starts
from simplernn_jax.ops.collectives import axis_index, axis_size, broadcast_from_last, shift
from simplernn_jax.ops.convolution_sharding import mask_to_last_segment
from simplernn_jax.ops.incoming_state import read_state, shard_decay
from simplernn_jax.ops.reset_state import reset_state
from simplernn_jax.ops.rms_norm import rms_norm
from simplernn_jax.ops.rms_norm_convolution import rms_norm_convolution

AXIS = "sequence"


def min_shard_tokens(short_convolution: int) -> int:
    """Return the fewest tokens per shard: a convolution takes its past inputs from one other."""
    return max(3, short_convolution - 1)


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
    state_dtype: Any = None,
    recurrence: Callable[..., tuple[Values, RecurrentState]] = gated_linear_recurrence,
) -> tuple[Values, RecurrentState]:
    """Compute `gated_linear_recurrence` of sequences that may be sharded.

    Args:
      q: ``[B, T / sequence, H, K]``.
      k: likewise.
      v: ``[B, T / sequence, H, V]``.
      log_gate: ``[B, T / sequence, H, K]``.
      initial_state: ``[B, H, K, V]`` before the sequence's first token; None starts from zero.
      segment_ids: as `shard_segment_ids` returns them; None if all is one segment.
      state_dtype: as in `gated_linear_recurrence`; must be None if the sequences are sharded.
      recurrence: computes each shard, with the arguments of `gated_linear_recurrence`.

    Returns:
      The output of this device's shard, and the state after the sequence's last token, on all
      devices. Raises what `recurrence` does, and ValueError for a `state_dtype` of sharded ones.
    """
    if axis_size(AXIS) == 1:
        options = {"initial_state": initial_state, "segment_ids": segment_ids}
        return recurrence(q, k, v, log_gate, state_dtype=state_dtype, **options)
    if state_dtype is not None:
        raise ValueError(f"{state_dtype=}: sharded sequences need a float32 state (None)")
    from_zero, state = recurrence(q, k, v, log_gate, segment_ids=segment_ids)
    log_gate = log_gate.astype(state.dtype)
    before_reset = None if segment_ids is None else segment_ids == 0
    incoming, outgoing = _scan_shards(shard_decay(log_gate, before_reset), state, initial_state)
    # The gradient recomputes the decays instead of saving one more array of every token.
    output = from_zero + jax.checkpoint(read_state)(q, log_gate, before_reset, incoming)
    return output.astype(v.dtype), broadcast_from_last(outgoing, AXIS)


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
      x: ``[B, T / sequence, D]``.
      weights: ``[W, D]``.
      state: inputs of the convolution before the sequence's first token, ``[B, W - 1, D]``.
      segment_ids: as `shard_segment_ids` returns them; None if all is one segment.
      normalize: as in `rms_norm_convolution`.

    Returns:
      The output of this device's shard, and the state after the sequence's last token, zero where
      it is not of the last token's segment. Raises what `rms_norm_convolution` does, and ValueError
      for a shard with fewer than W - 1 tokens.
    """
    starts = None if segment_ids is None else segment_starts(segment_ids)
    if axis_size(AXIS) > 1:
        past, length = state.shape[1], x.shape[1]
        if length < past:
            raise ValueError(
                f"x: sequence shards of {length} tokens; the convolution needs at least {past}"
            )
        own = x[:, length - past :].astype(state.dtype)
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


def _scan_shards(
    decay: jax.Array, state: jax.Array, initial_state: RecurrentState | None
) -> tuple[jax.Array, jax.Array]:
    """Compute the states before and after this device's shard; `state` is from a zero state."""
    if initial_state is None:
        initial_state = jnp.zeros_like(state)
    is_first = jnp.equal(axis_index(AXIS), 0)
    decay = decay[..., None]
    # The first shard's state is that of the sequence, and depends on no other shard.
    state = jnp.where(is_first, decay * initial_state + state, state)
    decay = jnp.where(is_first, 0, decay)
    distance = 1
    while distance < axis_size(AXIS):
        # The first shards receive zeros, which change no state.
        before = shift(jnp.concatenate([state, decay], axis=-1), AXIS, distance)
        state = decay * before[..., :-1] + state
        decay = decay * before[..., -1:]
        distance *= 2
    return jnp.where(is_first, initial_state, shift(state, AXIS)), state
