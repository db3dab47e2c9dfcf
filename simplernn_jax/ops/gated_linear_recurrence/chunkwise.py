"""The recurrence as matmuls over chunks of time, and its gradient.

Notation, per head: l is the log gate, b_i its inclusive sum from the start of a chunk of C tokens,
S the state at the chunk's start. The chunk's output and next state are::

    y_i = (q_i e^{b_i})^T S + sum_{j <= i} A_ij v_j,     A_ij = sum_K q_i k_j e^{b_i - b_j}
    S'  = diag(e^{b_C}) S + sum_j (k_j e^{b_C - b_j}) v_j^T

`join_blocks` computes A and the decayed q and k for a group of chunks. A short unrolled loop then
computes their states, and matmuls over the whole group the rest.

e^{b_i - b_j} cannot be split into e^{b_i} e^{-b_j} (overflow), so A is built hierarchically
(compare secondary-level chunking, arXiv:2312.06635, section 4.3). In blocks of 8 tokens both
factors are relative to the block's midpoint. Then the block size is doubled, 8 to 16 to 32 ...: A
between a left and a right block is ``q_right (k_left)^T`` where q carries its decay since the start
of its block and k its decay to the end of its block, both at most 1. After joining, the right q and
the left k are multiplied by the other block's total decay. At the chunk's size, they are the q and
k that the state needs. docs/recurrence.md derives the gradient and lists errors.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from simplernn_jax.array_types import RecurrentState
from simplernn_jax.ops.gated_linear_recurrence.scan import RecurrenceInputs
from simplernn_jax.ops.primitive import vary_like

BLOCK = 8
HALF = BLOCK // 2

GROUP_ELEMENTS = 2**18
"""Largest array of one group of chunks: 1 MiB of float32 stays in a core's cache, and fewer, larger
operations cost less than many small ones."""

MAX_GROUP = 16
"""Maximum chunks of a group; the loop over their states is unrolled."""


class Levels(NamedTuple):
    """Results of the hierarchy: A, and the decayed q and k of each level and of the chunk."""

    query_factor: jax.Array  # [N, C, K] decay of q since the start of its half block
    key_factor: jax.Array  # [N, C, K] decay of k to the end of its half block
    levels: list[tuple[int, jax.Array, jax.Array, jax.Array]]  # (size, q, k, total decay)
    decayed_q: jax.Array  # [N, C, K] q e^{b_i}
    decayed_k: jax.Array  # [N, C, K] k e^{b_C - b_i}
    total: jax.Array  # [N, K] e^{b_C}
    attention: jax.Array  # [N, C, C] A, without segment mask


class Groups(NamedTuple):
    """The division of time into groups of `chunks` chunks of `size` tokens."""

    size: int
    chunks: int


def choose_groups(shape: Sequence[int], value_dim: int, chunk_size: int | None = None) -> Groups:
    """Divide the tokens of q of `shape`.

    Chunks of 32 tokens are about the fastest on a CPU; not tuned on GPUs. The chunks per group are
    a power of two, by the size of their arrays, that pads time by at most an eighth.
    """
    batch, length, heads, key_dim = shape
    if chunk_size is None:
        chunk_size = 32
        while chunk_size > BLOCK and chunk_size >= 2 * length:
            chunk_size //= 2
    count = -(-length // chunk_size)
    elements = batch * heads * max(chunk_size * max(key_dim, value_dim), key_dim * value_dim)
    group = MAX_GROUP
    while group > 1 and (group * elements > GROUP_ELEMENTS or -count % group > count // 8):
        group //= 2
    return Groups(chunk_size, group)


def chunkwise(
    inputs: RecurrenceInputs, chunk_size: int | None, *, with_starts: bool = False
) -> tuple[jax.Array, ...]:
    """Compute the recurrence chunk by chunk, with matmuls inside chunks.

    Returns:
      The output and the final state as `scan`, and, if `with_starts`, the chunk-start states
      ``[groups, chunks, B * H, K, V]``, in the dtype of the state.
    """
    groups = choose_groups(inputs.q.shape, inputs.v.shape[3], chunk_size)
    state, output, starts = _forward(groups, _padded(inputs, groups), with_starts=with_starts)
    output = output[:, : inputs.q.shape[1]]
    return (output, state, starts) if with_starts else (output, state)


def chunkwise_gradient(
    inputs: RecurrenceInputs,
    d_output: jax.Array,
    d_final_state: jax.Array,
    chunk_size: int | None,
    starts: jax.Array | None = None,
    final_state: jax.Array | None = None,
) -> tuple[jax.Array, ...]:
    """Compute the gradients of q, k, v, log_gate and the initial state, of their shapes and dtypes.

    `starts` and `final_state` come from `chunkwise`; without them they are recomputed.
    """
    length = inputs.q.shape[1]
    groups = choose_groups(inputs.q.shape, inputs.v.shape[3], chunk_size)
    inputs = _padded(inputs, groups)
    if starts is None or final_state is None:
        final_state, _, starts = _forward(groups, inputs, with_output=False, with_starts=True)
    d_output = _pad(d_output, inputs.q.shape[1] - length)
    inputs = inputs._replace(state=final_state)
    *gradients, d_state = _backward(groups, inputs, d_output, starts, d_final_state)
    return *(gradient[:, :length] for gradient in gradients), d_state


def _padded(inputs: RecurrenceInputs, groups: Groups) -> RecurrenceInputs:
    """Pad T to whole groups, and clear the gates at resets."""
    q, k, v, log_gate, state, reset = inputs
    padding = -q.shape[1] % (groups.size * groups.chunks)
    if reset is not None:
        log_gate = jnp.where(reset[:, :, None, None], 0, log_gate)
        # Padding must not reset: the final state follows the last real token.
        reset = jnp.pad(reset, ((0, 0), (0, padding)))
    # q = k = v = 0 and a gate of 1 leave the state as it is.
    q, k, v, log_gate = (_pad(x, padding) for x in (q, k, v, log_gate))
    return RecurrenceInputs(q, k, v, log_gate, state, reset)


def _pad(x: jax.Array, padding: int) -> jax.Array:
    return jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) if padding else x


def _forward(
    groups: Groups, inputs: RecurrenceInputs, *, with_output: bool = True, with_starts: bool = False
) -> tuple[RecurrentState, Any, Any]:
    """Loop over groups of chunks: the final state, the output, the chunk-start states."""
    q, k, v, log_gate, initial_state, reset = inputs
    batch, length, heads, _ = q.shape
    dtype = initial_state.dtype
    states = (groups.chunks, batch * heads, *initial_state.shape[2:])

    def body(carry: Any, index: jax.Array) -> tuple[Any, Any]:
        state, output = carry
        take = partial(_slice_group, groups=groups, index=index, dtype=dtype)
        chunk_q, chunk_k, chunk_v, chunk_l = take(q), take(k), take(v), take(log_gate)
        levels = join_blocks(chunk_q, chunk_k, chunk_l)
        masks = _chunk_masks(groups, reset, index, heads)
        attention = _keep(masks.same_segment, levels.attention)
        decayed_q = _keep(masks.reads_start, levels.decayed_q)
        decayed_k = _keep(masks.reaches_end, levels.decayed_k)
        added = (decayed_k.mT @ chunk_v).reshape(states)
        total = levels.total.reshape(*states[:3], 1)
        at_starts = []
        for chunk in range(groups.chunks):
            at_starts.append(state)
            state = _decayed(state, total, masks, chunk) + added[chunk]
        starts = jnp.stack(at_starts)
        saved = starts if with_starts else None
        if not with_output:
            return (state, output), saved
        from_start = _keep(masks.reads_start, decayed_q @ starts.reshape(-1, *states[2:]))
        chunk_output = from_start + attention @ chunk_v
        return (state, _store_group(groups, output, chunk_output, index)), saved

    output: Any = ()
    if with_output:
        # In `dtype`: XLA's CPU backend converts a whole bfloat16 array to update a part of it.
        output = vary_like(jnp.zeros(v.shape, dtype), initial_state)
    start = (initial_state.reshape(states[1:]), output)
    indices = jnp.arange(length // (groups.size * groups.chunks))
    (state, output), starts = jax.lax.scan(body, start, indices)
    output = output.astype(v.dtype) if with_output else None
    return state.reshape(initial_state.shape), output, starts


def _backward(
    groups: Groups,
    inputs: RecurrenceInputs,
    d_output: jax.Array,
    starts: jax.Array,
    d_final_state: jax.Array,
) -> list[jax.Array]:
    """Loop over groups from the last to the first, with the gradient of the state as carry.

    The state of `inputs` is the final one.
    """
    q, k, v, log_gate, final_state, reset = inputs
    batch, length, heads, _ = q.shape
    dtype = final_state.dtype
    states = (groups.chunks, batch * heads, *final_state.shape[2:])

    def body(carry: Any, xs: Any) -> tuple[Any, None]:
        d_state, end_state, d_q, d_k, d_v, d_l = carry
        index, starts = xs
        take = partial(_slice_group, groups=groups, index=index, dtype=dtype)
        chunk_q, chunk_k, chunk_v, chunk_l = take(q), take(k), take(v), take(log_gate)
        chunk_dy = take(d_output)
        levels = join_blocks(chunk_q, chunk_k, chunk_l)
        masks = _chunk_masks(groups, reset, index, heads)
        attention = _keep(masks.same_segment, levels.attention)
        decayed_q = _keep(masks.reads_start, levels.decayed_q)
        decayed_k = _keep(masks.reaches_end, levels.decayed_k)

        ends = jnp.concatenate([starts[1:], end_state[None]])
        d_state_from_output = (decayed_q.mT @ chunk_dy).reshape(states)
        decays = levels.total.reshape(*states[:3], 1)
        d_ends = []
        for chunk in reversed(range(groups.chunks)):
            d_ends.append(d_state)
            d_state = _decayed(d_state, decays, masks, chunk) + d_state_from_output[chunk]
        d_end = jnp.stack(d_ends[::-1]).reshape(-1, *states[2:])
        state = starts.reshape(-1, *states[2:])

        d_attention = chunk_dy @ chunk_v.mT
        causal = jnp.tri(groups.size, dtype=bool)[None]
        d_attention = _keep(masks.same_segment, _keep(causal, d_attention))
        chunk_dv = attention.mT @ chunk_dy + decayed_k @ d_end
        d_decayed_q = _keep(masks.reads_start, chunk_dy @ state.mT)
        d_decayed_k = _keep(masks.reaches_end, chunk_v @ d_end.mT)
        chunk_dq, chunk_dk = join_blocks_bwd(
            levels, chunk_q, chunk_k, d_attention, d_decayed_q, d_decayed_k
        )
        # db_i = q_i dq_i - k_i dk_i, plus the end-state term at i = C; dl_t = sum_{i >= t} db_i.
        d_b = chunk_q * chunk_dq - chunk_k * chunk_dk
        d_total = jnp.sum(ends.reshape(d_end.shape) * d_end, axis=-1)
        later = jnp.tri(groups.size, dtype=bool).T[None]
        if masks.same_segment is not None:
            # Not through later segments, whose terms cancel up to rounding.
            later = later & masks.same_segment
        d_total = _keep(masks.reaches_end, d_total[:, None])
        # A matmul, since XLA's CPU backend takes longer for a cumulative sum.
        highest = jax.lax.Precision.HIGHEST
        chunk_dl = jnp.matmul(later.astype(dtype), d_b, precision=highest) + d_total
        chunk_dl = _keep(masks.continues, chunk_dl)
        store = partial(_store_group, groups, index=index)
        grads = (store(d_q, chunk_dq), store(d_k, chunk_dk), store(d_v, chunk_dv))
        return (d_state, starts[0], *grads, store(d_l, chunk_dl)), None

    start = (
        d_final_state.reshape(states[1:]),
        final_state.reshape(states[1:]),
        *(vary_like(jnp.zeros(x.shape, dtype), final_state) for x in (q, k, v, log_gate)),
    )
    indices = jnp.arange(length // (groups.size * groups.chunks))
    (d_state, _, *grads), _ = jax.lax.scan(body, start, (indices, starts), reverse=True)
    grads = [grad.astype(x.dtype) for grad, x in zip(grads, (q, k, v, log_gate), strict=True)]
    return [*grads, d_state.reshape(final_state.shape)]


def _slice_group(x: jax.Array, *, groups: Groups, index: jax.Array, dtype: Any) -> jax.Array:
    """Take the chunks of group `index` of ``[B, T, H, K]`` as ``[G * B * H, C, K]``."""
    batch, _, heads, width = x.shape
    tokens = groups.size * groups.chunks
    chunk = jax.lax.dynamic_slice_in_dim(x, index * tokens, tokens, axis=1)
    chunk = chunk.astype(dtype).reshape(batch, groups.chunks, groups.size, heads, width)
    return chunk.transpose(1, 0, 3, 2, 4).reshape(-1, groups.size, width)


def _store_group(groups: Groups, whole: jax.Array, chunk: jax.Array, index: jax.Array) -> jax.Array:
    """Store ``[G * B * H, C, K]`` as group `index` of ``[B, T, H, K]``."""
    batch, _, heads, width = whole.shape
    tokens = groups.size * groups.chunks
    chunk = chunk.reshape(groups.chunks, batch, heads, groups.size, width)
    chunk = chunk.transpose(1, 0, 3, 2, 4).reshape(batch, tokens, heads, width)
    return jax.lax.dynamic_update_slice_in_dim(whole, chunk, index * tokens, axis=1)


class Masks(NamedTuple):
    """Segment masks of a group of chunks, for each sequence and head; None keeps everything."""

    continues: jax.Array | None = None  # [N, C, 1] the token does not start a segment
    reads_start: jax.Array | None = None  # [N, C, 1] the state at the chunk's start reaches it
    reaches_end: jax.Array | None = None  # [N, C, 1] the token reaches the state at the chunk's end
    same_segment: jax.Array | None = None  # [N, C, C]
    keeps_state: jax.Array | None = None  # [chunks, B H, 1, 1] the start reaches the end


def _chunk_masks(groups: Groups, reset: jax.Array | None, index: jax.Array, heads: int) -> Masks:
    if reset is None:
        return Masks()
    tokens = groups.size * groups.chunks
    chunk = jax.lax.dynamic_slice_in_dim(reset, index * tokens, tokens, axis=1)
    chunk = chunk.reshape(-1, groups.chunks, groups.size).swapaxes(0, 1).reshape(-1, groups.size)
    chunk = jnp.repeat(chunk, heads, axis=0)
    segment = jnp.cumsum(chunk.astype(jnp.int32), axis=1)[..., None]
    last = segment[:, -1:]
    return Masks(
        continues=~chunk[..., None],
        reads_start=segment == 0,
        reaches_end=segment == last,
        same_segment=segment == segment.mT,
        keeps_state=(last == 0).reshape(groups.chunks, -1, 1, 1),
    )


def _keep(mask: jax.Array | None, x: jax.Array) -> jax.Array:
    """Zero `x` where `mask` is False, even from infinity: not a multiplication by zero."""
    return x if mask is None else jnp.where(mask, x, 0)


def _decayed(state: jax.Array, decays: jax.Array, masks: Masks, chunk: int) -> jax.Array:
    """Decay a state ``[B H, K, V]`` by a chunk of a group, or reset it."""
    keeps = None if masks.keeps_state is None else masks.keeps_state[chunk]
    return _keep(keeps, decays[chunk] * state)


def join_blocks(q: jax.Array, k: jax.Array, log_gate: jax.Array) -> Levels:
    """Compute A and the decayed q and k of each chunk, from ``[N, C, K]`` arrays."""
    count, size, key_dim = q.shape
    halves = jnp.maximum(log_gate, _floor(log_gate.dtype)).reshape(count, -1, HALF, key_dim)
    since_start = jnp.cumsum(halves, axis=2)
    # A suffix sum, not a difference of sums, so that nothing cancels.
    following = jnp.flip(jnp.cumsum(jnp.flip(halves[:, :, 1:], 2), axis=2), 2)
    to_end = jnp.pad(following, ((0, 0), (0, 0), (0, 1), (0, 0)))
    query_factor = jnp.exp(since_start).reshape(q.shape)
    key_factor = jnp.exp(to_end).reshape(q.shape)
    total = jnp.exp(since_start[:, :, -1])
    decayed_q, decayed_k = q * query_factor, k * key_factor
    attention = _diagonal_blocks(q, k, query_factor, key_factor)
    decayed_q, decayed_k, total = _merge_pairs(decayed_q, decayed_k, total, HALF)
    levels = []
    block = BLOCK
    while block < size:
        levels.append((block, decayed_q, decayed_k, total))
        (_, right_q), (left_k, _) = _split(decayed_q, block), _split(decayed_k, block)
        between = right_q @ left_k.mT
        upper = jnp.concatenate([attention[:, 0::2], jnp.zeros_like(between)], axis=-1)
        lower = jnp.concatenate([between, attention[:, 1::2]], axis=-1)
        attention = jnp.concatenate([upper, lower], axis=-2)
        decayed_q, decayed_k, total = _merge_pairs(decayed_q, decayed_k, total, block)
        block *= 2
    return Levels(
        query_factor, key_factor, levels, decayed_q, decayed_k, total[:, 0], attention[:, 0]
    )


def join_blocks_bwd(
    levels: Levels,
    q: jax.Array,
    k: jax.Array,
    d_attention: jax.Array,
    d_q: jax.Array,
    d_k: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Compute the gradients of q and k, all ``[N, C, K]``.

    `d_attention` ``[N, C, C]`` is zero where A is masked; `d_q`, `d_k` belong to the decayed q, k.
    """
    blocks = d_attention[:, None]
    for size, level_q, level_k, total in reversed(levels.levels):
        (_, right_q), (left_k, _) = _split(level_q, size), _split(level_k, size)
        between = blocks[:, :, size:, :size]
        d_q, d_k = _merge_pairs_bwd(d_q, d_k, total, size, between @ left_k, between.mT @ right_q)
        blocks = jnp.stack([blocks[:, :, :size, :size], blocks[:, :, size:, size:]], axis=2)
        blocks = blocks.reshape(blocks.shape[0], -1, size, size)
    half_total = levels.query_factor.reshape(q.shape[0], -1, HALF, q.shape[-1])[:, :, -1]
    d_q, d_k = _merge_pairs_bwd(d_q, d_k, half_total, HALF, 0, 0)
    for_q, for_k = _diagonal_factors(levels.query_factor, levels.key_factor)
    shape = (q.shape[0], -1, BLOCK, q.shape[-1])
    inside_q = (blocks @ (k * for_k).reshape(shape)).reshape(q.shape) * for_q
    inside_k = (blocks.mT @ (q * for_q).reshape(shape)).reshape(q.shape) * for_k
    return d_q * levels.query_factor + inside_q, d_k * levels.key_factor + inside_k


def _floor(dtype: Any) -> float:
    # Half a block of floored gates must stay within the exponent's range: 4 * 16 = 64 < 87 for
    # float32, 4 * 75 = 300 < 708 for float64. A gate of e^-16 = 1e-7 is below float32's resolution.
    return -75.0 if dtype == jnp.float64 else -16.0


def _split(x: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """Split ``[N, C, K]`` into left and right blocks, each ``[N, C / (2 size), size, K]``."""
    pairs = x.reshape(x.shape[0], -1, 2, size, x.shape[-1])
    return pairs[:, :, 0], pairs[:, :, 1]


def _merge(left: jax.Array, right: jax.Array) -> jax.Array:
    """Invert `_split`."""
    return jnp.stack([left, right], axis=2).reshape(left.shape[0], -1, left.shape[-1])


def _merge_pairs(
    q: jax.Array, k: jax.Array, total: jax.Array, size: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Compute q, k and total decays of blocks of 2 * size from blocks of `size`."""
    left_total, right_total = total[:, 0::2, None], total[:, 1::2, None]
    (left_q, right_q), (left_k, right_k) = _split(q, size), _split(k, size)
    q = _merge(left_q, right_q * left_total)
    k = _merge(left_k * right_total, right_k)
    return q, k, total[:, 0::2] * total[:, 1::2]


def _diagonal_factors(
    query_factor: jax.Array, key_factor: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Compute the decays of q and k in blocks of 8, both relative to the midpoint."""
    left_key, right_query = _split(key_factor, HALF)[0], _split(query_factor, HALF)[1]
    return _merge(1 / left_key, right_query), _merge(left_key, 1 / right_query)


def _diagonal_blocks(
    q: jax.Array, k: jax.Array, query_factor: jax.Array, key_factor: jax.Array
) -> jax.Array:
    """Compute A inside blocks of 8: ``[N, C / 8, 8, 8]``."""
    for_q, for_k = _diagonal_factors(query_factor, key_factor)
    shape = (q.shape[0], -1, BLOCK, q.shape[-1])
    inside = (q * for_q).reshape(shape) @ (k * for_k).reshape(shape).mT
    return jnp.where(jnp.tri(BLOCK, dtype=bool)[None, None], inside, 0)


def _merge_pairs_bwd(
    d_q: jax.Array, d_k: jax.Array, total: jax.Array, size: int, add_right_q: Any, add_left_k: Any
) -> tuple[jax.Array, jax.Array]:
    """Compute the gradient of `_merge_pairs` for q and k, and the part through A between blocks."""
    left_total, right_total = total[:, 0::2, None], total[:, 1::2, None]
    (left_q, right_q), (left_k, right_k) = _split(d_q, size), _split(d_k, size)
    d_q = _merge(left_q, right_q * left_total + add_right_q)
    return d_q, _merge(left_k * right_total + add_left_k, right_k)
