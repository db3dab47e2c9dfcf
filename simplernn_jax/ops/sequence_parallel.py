"""Recurrence and short convolution of sequences that are sharded over the mesh axis ``sequence``.

Inside `jax.shard_map`, every argument is this device's sequence shard; elsewhere it is the whole
sequence, and nothing is exchanged. Each device runs its shard from a zero state. With b_i the
inclusive sum of the log gates from the shard's start to its token i of T, and S_in the state before
the shard, ::

    y_i = (from zero)_i + (q_i e^{b_i})^T S_in          S_out = diag(e^{b_T}) S_in + (from zero)

so (e^{b_T}, S from zero) is all that one device needs of another: K (V + 1) numbers of each head
and sequence, whatever T is. Two neighboring shards compose to (D_1 D_2, D_2 S_1 + S_2), which is
associative, so n devices know their S_in after log2(n) exchanges and one more. Gradients follow
from JAX's own derivative of the exchanges.

Documents: `shard_segment_ids` numbers the segments of a shard from 0 if its first token continues
the segment of the token before the shard, else from 1. Only tokens with id 0 can see S_in, so
nothing else about boundaries is exchanged.
"""

from typing import Any

import jax
import jax.numpy as jnp

from simplernn_jax.array_types import (
    Activations,
    ConvState,
    HeadState,
    Keys,
    LogGates,
    Queries,
    SegmentIds,
    Values,
)
from simplernn_jax.ops import gated_linear_recurrence, segment_starts
from simplernn_jax.ops.collectives import axis_index, axis_size, broadcast_from_last, shift
from simplernn_jax.ops.rms_norm import rms_norm
from simplernn_jax.ops.rms_norm_convolution import rms_norm_convolution

AXIS = "sequence"

LEAST_TOKENS = 3
"""Tokens of a shard: the short convolution takes its past inputs from one neighbor."""


def shard_segment_ids(segment_ids: SegmentIds) -> SegmentIds:
    """Number the segments of this device's shard; 0 is the segment of the token before it.

    Args:
      segment_ids: ``[B, T / sequence]``, any ids; a change of id begins a segment.
    """
    if axis_size(AXIS) == 1:
        return segment_ids
    before = shift(segment_ids[:, -1:], AXIS)
    # Before the sequence's first token is its incoming state, of the same segment.
    before = jnp.where(axis_index(AXIS) == 0, segment_ids[:, :1], before)
    begins = segment_ids != jnp.concatenate([before, segment_ids[:, :-1]], axis=1)
    return jnp.cumsum(begins, axis=1, dtype=segment_ids.dtype)


def sharded_recurrence(
    q: Queries,
    k: Keys,
    v: Values,
    log_gate: LogGates,
    *,
    initial_state: HeadState | None = None,
    segment_ids: SegmentIds | None = None,
    state_dtype: Any = None,
) -> tuple[Values, HeadState]:
    """`gated_linear_recurrence` of sequences that may be sharded.

    Args:
      q: ``[B, T / sequence, H, K]``.
      k: likewise.
      v: ``[B, T / sequence, H, V]``.
      log_gate: ``[B, T / sequence, H, K]``.
      initial_state: ``[B, H, K, V]`` before the sequence's first token; None is zero.
      segment_ids: as `shard_segment_ids` returns them; None if all is one segment.
      state_dtype: as in `gated_linear_recurrence`; None if the sequences are sharded.

    Returns:
      The output of this device's shard, and the state after the sequence's last token, on all
      devices.
    """
    if axis_size(AXIS) == 1:
        return gated_linear_recurrence(
            q,
            k,
            v,
            log_gate,
            initial_state=initial_state,
            segment_ids=segment_ids,
            state_dtype=state_dtype,
        )
    from_zero, state = gated_linear_recurrence(q, k, v, log_gate, segment_ids=segment_ids)
    log_gate = log_gate.astype(state.dtype)
    incoming, outgoing = _states_between(_decay(log_gate, segment_ids), state, initial_state)
    # The gradient recomputes the decays instead of keeping one more array of every token.
    output = from_zero + jax.checkpoint(_read)(q, log_gate, segment_ids, incoming)
    return output.astype(v.dtype), broadcast_from_last(outgoing, AXIS)


def sharded_convolution(
    x: Activations, weights: jax.Array, state: ConvState, segment_ids: SegmentIds | None
) -> tuple[Activations, ConvState]:
    """`rms_norm_convolution` of sequences that may be sharded, within segments.

    Args:
      x: ``[B, T / sequence, D]``.
      weights: ``[W, D]``.
      state: normalized inputs before the sequence's first token, ``[B, W - 1, D]``.
      segment_ids: as `shard_segment_ids` returns them; None if all is one segment.

    Returns:
      The output of this device's shard, and the state after the sequence's last token, zero where
      it is not of the last token's segment.
    """
    starts = None if segment_ids is None else segment_starts(segment_ids)
    if axis_size(AXIS) > 1:
        own = rms_norm(x[:, x.shape[1] - state.shape[1] :].astype(state.dtype))
        state = halo(_in_last_segment(own, starts), state, segment_ids)
    y, recent = rms_norm_convolution(x, weights, state, starts)
    return y, broadcast_from_last(_in_last_segment(recent, starts), AXIS)


def halo(own: jax.Array, first: jax.Array, ids: SegmentIds | None) -> jax.Array:
    """The end of the shard before, as far as this shard may see it.

    Args:
      own: the end of this shard, zero outside of its last segment, ``[B, ...]``.
      first: the same before the sequence's first token.
      ids: as `shard_segment_ids` returns them, or None.
    """
    before = jnp.where(axis_index(AXIS) == 0, first, shift(own, AXIS))
    if ids is None:
        return before
    sees = ids[:, 0] == 0
    return jnp.where(sees.reshape(-1, *[1] * (before.ndim - 1)), before, 0)


def _in_last_segment(recent: ConvState, starts: jax.Array | None) -> ConvState:
    """The inputs until the last token, zero where they are not of its segment."""
    if starts is None:
        return recent
    late = jnp.pad(starts, ((0, 0), (recent.shape[1], 0)))[:, starts.shape[1] :].astype(jnp.int32)
    starts_after = jnp.flip(jnp.cumsum(jnp.flip(late, 1), axis=1), 1) - late
    return jnp.where(starts_after[..., None] > 0, 0, recent)


def _read(
    q: jax.Array, log_gate: jax.Array, ids: SegmentIds | None, incoming: HeadState
) -> jax.Array:
    """``(q_i e^{b_i})^T S_in`` where token i sees the state before the shard; 0 elsewhere."""
    decay = jnp.exp(jnp.cumsum(_seen(log_gate, ids), axis=1))
    read = _seen(q.astype(incoming.dtype) * decay, ids)
    return jnp.einsum("bthk,bhkv->bthv", read, incoming)


def _decay(log_gate: jax.Array, ids: SegmentIds | None) -> jax.Array:
    """e^{b_T} ``[B, H, K]``: the factor of the shard on the state before it."""
    decay = jnp.exp(jnp.sum(_seen(log_gate, ids), axis=1))
    return decay if ids is None else jnp.where(ids[:, -1, None, None] == 0, decay, 0)


def _seen(x: jax.Array, ids: SegmentIds | None) -> jax.Array:
    """`x` ``[B, T, H, K]`` at the tokens that see the state before the shard; 0 elsewhere."""
    return x if ids is None else jnp.where(ids[..., None, None] == 0, x, 0)


def _states_between(
    decay: jax.Array, state: jax.Array, initial_state: HeadState | None
) -> tuple[jax.Array, jax.Array]:
    """The true states before and after each device's shard.

    Args:
      decay: of the whole shard, ``[B, H, K]``.
      state: after the shard, run from zero.
      initial_state: before the first device's shard.
    """
    if initial_state is None:
        initial_state = jnp.zeros_like(state)
    is_first = jnp.equal(axis_index(AXIS), 0)
    decay = decay[..., None]
    # The first device's range begins with the sequence: its state is true, nothing comes before.
    state = jnp.where(is_first, decay * initial_state + state, state)
    decay = jnp.where(is_first, 0, decay)
    distance = 1
    while distance < axis_size(AXIS):
        # Before the first shards come zeros, which change no state.
        before = shift(jnp.concatenate([state, decay], axis=-1), AXIS, distance)
        state = decay * before[..., :-1] + state
        decay = decay * before[..., -1:]
        distance *= 2
    return jnp.where(is_first, initial_state, shift(state, AXIS)), state
