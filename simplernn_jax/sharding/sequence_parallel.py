"""The recurrence over stretches of time that lie on different devices, axis ``sequence``.

Each device runs its stretch from a zero state. With b_i the inclusive sum of the log gates from
the stretch's start to its token i of T, and S_in the state before the stretch, ::

    y_i = (from zero)_i + (q_i e^{b_i})^T S_in          S_out = diag(e^{b_T}) S_in + (from zero)

so (e^{b_T}, S from zero) is all that one device needs of another: K (V + 1) numbers of each head
and row, whatever T is. Two neighbouring stretches are one with (D_1 D_2, D_2 S_1 + S_2); that is
associative, and n devices know their S_in after log2(n) exchanges and one more. Gradients
follow from JAX's own derivative of the exchanges.

Documents: `shard_segment_ids` numbers the segments of a shard from 0 if its first token continues
the segment of the token before the shard, else from 1. Only tokens with id 0 can see S_in, so
nothing else about boundaries is exchanged.
"""

import jax
import jax.numpy as jnp

from simplernn_jax.array_types import HeadState, Keys, LogGates, Queries, SegmentIds, Values
from simplernn_jax.ops import gated_linear_recurrence
from simplernn_jax.sharding.collectives import axis_index, axis_size, broadcast_from_last, shift

AXIS = "sequence"

LEAST_TOKENS = 3
"""Of a stretch: the short convolution takes them all from one neighbour."""


def shard_segment_ids(segment_ids: SegmentIds) -> SegmentIds:
    """Segments of this device's stretch, counted; 0 is that of the token before it.

    Args:
      segment_ids: ``[B, T / sequence]``, any ids; another one begins another segment.
    """
    before = shift(segment_ids[:, -1:], AXIS)
    # Before the row's first token lies its incoming state, of the same segment.
    before = jnp.where(axis_index(AXIS) == 0, segment_ids[:, :1], before)
    begins = segment_ids != jnp.concatenate([before, segment_ids[:, :-1]], axis=1)
    return jnp.cumsum(begins, axis=1, dtype=segment_ids.dtype)


def sequence_parallel_recurrence(
    q: Queries,
    k: Keys,
    v: Values,
    log_gate: LogGates,
    initial_state: HeadState | None,
    ids: SegmentIds | None,
) -> tuple[Values, HeadState]:
    """`gated_linear_recurrence` of the whole row; every argument is this device's stretch of it.

    Args:
      q: ``[B, T / sequence, H, K]``.
      k: likewise.
      v: ``[B, T / sequence, H, V]``.
      log_gate: ``[B, T / sequence, H, K]``, float32 at least.
      initial_state: ``[B, H, K, V]`` before the row's first token; None is zero.
      ids: what `shard_segment_ids` returned; None if all is one segment.

    Returns:
      The output of this device's stretch, and the state after the row's last token, on all
      devices.
    """
    from_zero, state = gated_linear_recurrence(q, k, v, log_gate, segment_ids=ids)
    log_gate = log_gate.astype(state.dtype)
    incoming, outgoing = _states_between(_decay(log_gate, ids), state, initial_state)
    # The gradient computes the decays again rather than keeping one more array of every token.
    output = from_zero + jax.checkpoint(_read)(q, log_gate, ids, incoming)
    return output.astype(v.dtype), broadcast_from_last(outgoing, AXIS)


def halo(own: jax.Array, first: jax.Array, ids: SegmentIds | None) -> jax.Array:
    """What the stretch before ended with, as far as this stretch may see it.

    Args:
      own: what this stretch ends with, of its last segment only, ``[B, ...]``.
      first: what lies before the row's first token.
      ids: what `shard_segment_ids` returned, or None.
    """
    before = jnp.where(axis_index(AXIS) == 0, first, shift(own, AXIS))
    if ids is None:
        return before
    sees = ids[:, 0] == 0
    return jnp.where(sees.reshape(-1, *[1] * (before.ndim - 1)), before, 0)


def _read(
    q: jax.Array, log_gate: jax.Array, ids: SegmentIds | None, incoming: HeadState
) -> jax.Array:
    """``(q_i e^{b_i})^T S_in`` where token i sees the state before the stretch; 0 elsewhere."""
    decay = jnp.exp(jnp.cumsum(_seen(log_gate, ids), axis=1))
    read = _seen(q.astype(incoming.dtype) * decay, ids)
    return jnp.einsum("bthk,bhkv->bthv", read, incoming)


def _decay(log_gate: jax.Array, ids: SegmentIds | None) -> jax.Array:
    """e^{b_T} ``[B, H, K]``: what the stretch leaves of the state before it."""
    decay = jnp.exp(jnp.sum(_seen(log_gate, ids), axis=1))
    return decay if ids is None else jnp.where(ids[:, -1, None, None] == 0, decay, 0)


def _seen(x: jax.Array, ids: SegmentIds | None) -> jax.Array:
    """`x` ``[B, T, H, K]`` at the tokens that see the state before the stretch; 0 elsewhere."""
    return x if ids is None else jnp.where(ids[..., None, None] == 0, x, 0)


def _states_between(
    decay: jax.Array, state: jax.Array, initial_state: HeadState | None
) -> tuple[jax.Array, jax.Array]:
    """The true states before and after each device's stretch.

    Args:
      decay: of the whole stretch, ``[B, H, K]``.
      state: after the stretch, run from zero.
      initial_state: before the first device's stretch.
    """
    if initial_state is None:
        initial_state = jnp.zeros_like(state)
    is_first = jnp.equal(axis_index(AXIS), 0)
    decay = decay[..., None]
    # The first device's range begins with the row: its state is true, and nothing comes before.
    state = jnp.where(is_first, decay * initial_state + state, state)
    decay = jnp.where(is_first, 0, decay)
    distance = 1
    while distance < axis_size(AXIS):
        # Where nothing lies so far before, zeros come: they change no state.
        before = shift(jnp.concatenate([state, decay], axis=-1), AXIS, distance)
        state = decay * before[..., :-1] + state
        decay = decay * before[..., -1:]
        distance *= 2
    return jnp.where(is_first, initial_state, shift(state, AXIS)), state
