"""The recurrence as matrix products over chunks of time, with its own gradient.

Notation, per head: l is the log gate, b_i its inclusive sum from the start of a chunk of C tokens,
S the state at the chunk's start. The chunk's output and next state are::

    y_i = (q_i e^{b_i})^T S + sum_{j <= i} A_ij v_j,     A_ij = sum_K q_i k_j e^{b_i - b_j}
    S'  = diag(e^{b_C}) S + sum_j (k_j e^{b_C - b_j}) v_j^T

e^{b_i - b_j} cannot be split into e^{b_i} e^{-b_j} (overflow), so A is built by doubling. Blocks
of 8 tokens refer both factors to their middle. Then neighbouring blocks are joined, 8 to 16 to
32 ...: A between a left and a right block is ``q_right (k_left)^T`` where q carries its decay since
the start of its block and k its decay to the end of its block, both at most 1. After joining,
the right q and the left k take the other block's total decay as a factor. At the chunk's size q and
k are just what the state needs. README.md has the derivation of the gradient and the error bounds.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from simplernn_jax.array_types import HeadState

BLOCK = 8
HALF = BLOCK // 2


class Levels(NamedTuple):
    """What the doubling of one chunk leaves: per level, decayed q and k, and the last of them."""

    query_factor: jax.Array  # [N, C, K] decay of q since the start of its half block
    key_factor: jax.Array  # [N, C, K] decay of k to the end of its half block
    levels: list[tuple[int, jax.Array, jax.Array, jax.Array]]  # (size, q, k, total decay)
    decayed_q: jax.Array  # [N, C, K] q e^{b_i}
    decayed_k: jax.Array  # [N, C, K] k e^{b_C - b_i}
    total: jax.Array  # [N, K] e^{b_C}
    attention: jax.Array  # [N, C, C] A, without segment mask


def chunkwise(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_gate: jax.Array,
    initial_state: jax.Array,
    clear: jax.Array | None,
    chunk_size: int | None,
) -> tuple[jax.Array, jax.Array]:
    """`scan` as one loop over chunks; same arguments and results."""
    length = q.shape[1]
    if chunk_size is None:
        chunk_size = choose_chunk_size(length)
    if chunk_size < BLOCK or chunk_size & (chunk_size - 1):
        raise ValueError(f"chunk_size={chunk_size}: must be a power of two of at least {BLOCK}")
    padding = -length % chunk_size
    if clear is not None:
        log_gate = jnp.where(clear[:, :, None, None], 0, log_gate)
        # Padding must not clear: the final state is that of the last real token.
        clear = jnp.pad(clear, ((0, 0), (0, padding)))
    if padding:
        # q = k = v = 0 and a gate of 1 leave the state as it is.
        pad = ((0, 0), (0, padding), (0, 0), (0, 0))
        q, k, v, log_gate = (jnp.pad(x, pad) for x in (q, k, v, log_gate))
    output, final_state = _chunked(chunk_size, q, k, v, log_gate, initial_state, clear)
    return output[:, :length], final_state


def choose_chunk_size(length: int) -> int:
    """Tokens per chunk: 32 measured fastest, or near it, for heads of 32, 64 and 128 on a CPU."""
    best = 32
    while best > BLOCK and best >= 2 * length:
        best //= 2
    return best


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(
    chunk_size: int,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_gate: jax.Array,
    initial_state: HeadState,
    clear: jax.Array | None,
) -> tuple[jax.Array, HeadState]:
    output, final_state, _ = _forward(chunk_size, q, k, v, log_gate, initial_state, clear, False)
    return output, final_state


def _chunked_fwd(
    chunk_size: int,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_gate: jax.Array,
    initial_state: HeadState,
    clear: jax.Array | None,
) -> tuple[Any, Any]:
    output, final_state, starts = _forward(
        chunk_size, q, k, v, log_gate, initial_state, clear, True
    )
    return (output, final_state), (q, k, v, log_gate, clear, starts, final_state)


def _forward(
    chunk_size: int,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_gate: jax.Array,
    initial_state: HeadState,
    clear: jax.Array | None,
    keep_states: bool,
) -> tuple[jax.Array, HeadState, jax.Array | None]:
    """Loops over chunks; keeps the state at the start of each if the gradient needs it."""
    batch, length, heads, _ = q.shape
    dtype = initial_state.dtype

    def body(carry: Any, index: jax.Array) -> tuple[Any, jax.Array | None]:
        state, output = carry
        part = partial(_slice_chunk, index=index, size=chunk_size, dtype=dtype)
        chunk_q, chunk_k, chunk_v, chunk_l = part(q), part(k), part(v), part(log_gate)
        levels = _join_blocks(chunk_q, chunk_k, chunk_l)
        masks = _chunk_masks(clear, index, chunk_size, heads)
        attention, read, written, total = _masked(levels, masks)
        chunk_output = read @ state + attention @ chunk_v
        next_state = total[:, :, None] * state + written.mT @ chunk_v
        output = _store_chunk(output, chunk_output, index, chunk_size)
        return (next_state, output), state if keep_states else None

    start = (initial_state.reshape(batch * heads, *initial_state.shape[2:]), jnp.zeros_like(v))
    (state, output), starts = jax.lax.scan(body, start, jnp.arange(length // chunk_size))
    return output, state.reshape(initial_state.shape), starts


def _chunked_bwd(chunk_size: int, residuals: Any, cotangents: Any) -> tuple[Any, ...]:
    """Loops over chunks from the last to the first, with the gradient of the state as carry."""
    q, k, v, log_gate, clear, starts, final_state = residuals
    d_output, d_final_state = cotangents
    batch, length, heads, _ = q.shape
    dtype = final_state.dtype

    def body(carry: Any, xs: Any) -> tuple[Any, None]:
        d_state, end_state, d_q, d_k, d_v, d_l = carry
        index, state = xs
        part = partial(_slice_chunk, index=index, size=chunk_size, dtype=dtype)
        chunk_q, chunk_k, chunk_v, chunk_l = part(q), part(k), part(v), part(log_gate)
        chunk_dy = part(d_output)
        levels = _join_blocks(chunk_q, chunk_k, chunk_l)
        masks = _chunk_masks(clear, index, chunk_size, heads)
        attention, read, written, total = _masked(levels, masks)

        d_attention = _causal(chunk_dy @ chunk_v.mT, masks)
        chunk_dv = attention.mT @ chunk_dy + written @ d_state
        d_read, d_written = chunk_dy @ state.mT, chunk_v @ d_state.mT
        if masks is not None:
            d_read = jnp.where(masks.reads_start[..., None], d_read, 0)
            d_written = jnp.where(masks.reaches_end[..., None], d_written, 0)
        chunk_dq, chunk_dk = _join_blocks_gradient(
            levels, chunk_q, chunk_k, d_attention, d_read, d_written
        )
        # b_i gathers q_i dq_i - k_i dk_i and b_C the whole end state; l_t is in every b_i, i >= t.
        d_b = chunk_q * chunk_dq - chunk_k * chunk_dk
        d_total = jnp.sum(end_state * d_state, axis=-1)
        chunk_dl = jnp.flip(jnp.cumsum(jnp.flip(d_b, 1), axis=1), 1) + d_total[:, None]
        if masks is not None:
            chunk_dl = jnp.where(masks.clear[..., None], 0, chunk_dl)
        d_state = total[:, :, None] * d_state + read.mT @ chunk_dy
        store = partial(_store_chunk, index=index, size=chunk_size)
        grads = (store(d_q, chunk_dq), store(d_k, chunk_dk), store(d_v, chunk_dv))
        return (d_state, state, *grads, store(d_l, chunk_dl)), None

    flat = (batch * heads, *final_state.shape[2:])
    start = (
        d_final_state.reshape(flat),
        final_state.reshape(flat),
        *(jnp.zeros_like(x) for x in (q, k, v, log_gate)),
    )
    chunks = jnp.arange(length // chunk_size)
    (d_state, _, *grads), _ = jax.lax.scan(body, start, (chunks, starts), reverse=True)
    return (*grads, d_state.reshape(final_state.shape), None)


_chunked.defvjp(_chunked_fwd, _chunked_bwd)


def _slice_chunk(x: jax.Array, *, index: jax.Array, size: int, dtype: Any) -> jax.Array:
    """Chunk `index` of ``[B, T, H, K]`` as ``[B * H, C, K]``."""
    chunk = jax.lax.dynamic_slice_in_dim(x, index * size, size, axis=1)
    batch, _, heads, width = chunk.shape
    return chunk.astype(dtype).swapaxes(1, 2).reshape(batch * heads, size, width)


def _store_chunk(whole: jax.Array, chunk: jax.Array, index: jax.Array, size: int) -> jax.Array:
    """Writes ``[B * H, C, K]`` back as chunk `index` of ``[B, T, H, K]``."""
    batch, _, heads, width = whole.shape
    chunk = chunk.reshape(batch, heads, size, width).swapaxes(1, 2).astype(whole.dtype)
    return jax.lax.dynamic_update_slice_in_dim(whole, chunk, index * size, axis=1)


class Masks(NamedTuple):
    """Which paths inside a chunk stay within one segment; every row of a batch has its own."""

    clear: jax.Array  # [N, C] the token starts a segment
    reads_start: jax.Array  # [N, C] the state at the chunk's start reaches the token
    reaches_end: jax.Array  # [N, C] the token reaches the state at the chunk's end
    same_segment: jax.Array  # [N, C, C]
    uncleared: jax.Array  # [N, 1] the state at the start reaches the end


def _chunk_masks(clear: jax.Array | None, index: jax.Array, size: int, heads: int) -> Masks | None:
    if clear is None:
        return None
    chunk = jax.lax.dynamic_slice_in_dim(clear, index * size, size, axis=1)
    chunk = jnp.repeat(chunk, heads, axis=0)
    segment = jnp.cumsum(chunk.astype(jnp.int32), axis=1)
    last = segment[:, -1:]
    return Masks(
        clear=chunk,
        reads_start=segment == 0,
        reaches_end=segment == last,
        same_segment=segment[:, :, None] == segment[:, None, :],
        uncleared=last == 0,
    )


def _causal(matrix: jax.Array, masks: Masks | None) -> jax.Array:
    size = matrix.shape[-1]
    allowed = jnp.tri(size, dtype=bool)[None]
    if masks is not None:
        allowed = allowed & masks.same_segment
    # `where`, not a product: what is left out may be anything.
    return jnp.where(allowed, matrix, 0)


def _masked(levels: Levels, masks: Masks | None) -> tuple[jax.Array, ...]:
    """A, the q that reads the start state, the k that writes the end state, the state's decay."""
    if masks is None:
        return levels.attention, levels.decayed_q, levels.decayed_k, levels.total
    return (
        jnp.where(masks.same_segment, levels.attention, 0),
        jnp.where(masks.reads_start[..., None], levels.decayed_q, 0),
        jnp.where(masks.reaches_end[..., None], levels.decayed_k, 0),
        jnp.where(masks.uncleared, levels.total, 0),
    )


def _floor(dtype: Any) -> float:
    # Half a block of floored gates must stay within the exponent's range: 4 * 16 = 64 < 87 for
    # float32, 4 * 75 = 300 < 708 for float64. A gate of e^-16 = 1e-7 is below float32's resolution.
    return -75.0 if dtype == jnp.float64 else -16.0


def _split(x: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """``[N, C, K]`` as left and right blocks of `size`, each ``[N, C / (2 size), size, K]``."""
    pairs = x.reshape(x.shape[0], -1, 2, size, x.shape[-1])
    return pairs[:, :, 0], pairs[:, :, 1]


def _merge(left: jax.Array, right: jax.Array) -> jax.Array:
    """The inverse of `_split`."""
    return jnp.stack([left, right], axis=2).reshape(left.shape[0], -1, left.shape[-1])


def _join_blocks(q: jax.Array, k: jax.Array, log_gate: jax.Array) -> Levels:
    """A of one chunk and the decayed q and k, by doubling; all ``[N, C, K]``."""
    count, size, key_dim = q.shape
    halves = jnp.maximum(log_gate, _floor(log_gate.dtype)).reshape(count, -1, HALF, key_dim)
    since_start = jnp.cumsum(halves, axis=2)
    # A sum of what follows, not a difference of sums: nothing cancels.
    following = jnp.flip(jnp.cumsum(jnp.flip(halves[:, :, 1:], 2), axis=2), 2)
    to_end = jnp.pad(following, ((0, 0), (0, 0), (0, 1), (0, 0)))
    query_factor = jnp.exp(since_start).reshape(q.shape)
    key_factor = jnp.exp(to_end).reshape(q.shape)
    total = jnp.exp(since_start[:, :, -1])
    decayed_q, decayed_k = q * query_factor, k * key_factor
    attention = _diagonal_blocks(q, k, query_factor, key_factor)
    decayed_q, decayed_k, total = _double(decayed_q, decayed_k, total, HALF)
    levels = []
    block = BLOCK
    while block < size:
        levels.append((block, decayed_q, decayed_k, total))
        (_, right_q), (left_k, _) = _split(decayed_q, block), _split(decayed_k, block)
        between = right_q @ left_k.mT
        upper = jnp.concatenate([attention[:, 0::2], jnp.zeros_like(between)], axis=-1)
        lower = jnp.concatenate([between, attention[:, 1::2]], axis=-1)
        attention = jnp.concatenate([upper, lower], axis=-2)
        decayed_q, decayed_k, total = _double(decayed_q, decayed_k, total, block)
        block *= 2
    return Levels(
        query_factor, key_factor, levels, decayed_q, decayed_k, total[:, 0], attention[:, 0]
    )


def _double(
    q: jax.Array, k: jax.Array, total: jax.Array, size: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Decays of blocks of 2 * size from those of blocks of `size`."""
    left_total, right_total = total[:, 0::2, None], total[:, 1::2, None]
    (left_q, right_q), (left_k, right_k) = _split(q, size), _split(k, size)
    q = _merge(left_q, right_q * left_total)
    k = _merge(left_k * right_total, right_k)
    return q, k, total[:, 0::2] * total[:, 1::2]


def _diagonal_factors(
    query_factor: jax.Array, key_factor: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Decays of q and k in a block of 8, both relative to its middle."""
    left_key, right_query = _split(key_factor, HALF)[0], _split(query_factor, HALF)[1]
    return _merge(1 / left_key, right_query), _merge(left_key, 1 / right_query)


def _diagonal_blocks(
    q: jax.Array, k: jax.Array, query_factor: jax.Array, key_factor: jax.Array
) -> jax.Array:
    """A inside blocks of 8: ``[N, C / 8, 8, 8]``."""
    for_q, for_k = _diagonal_factors(query_factor, key_factor)
    shape = (q.shape[0], -1, BLOCK, q.shape[-1])
    inside = (q * for_q).reshape(shape) @ (k * for_k).reshape(shape).mT
    return jnp.where(jnp.tri(BLOCK, dtype=bool)[None, None], inside, 0)


def _join_blocks_gradient(
    levels: Levels,
    q: jax.Array,
    k: jax.Array,
    d_attention: jax.Array,
    d_q: jax.Array,
    d_k: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Gradients of q and k, all ``[N, C, K]``.

    Args:
      levels: what `_join_blocks` returned for q and k.
      q: the chunk's queries.
      k: its keys.
      d_attention: gradient of A ``[N, C, C]``, zero where A is masked.
      d_q: gradient of ``levels.decayed_q``.
      d_k: gradient of ``levels.decayed_k``.
    """
    blocks = d_attention[:, None]
    for size, level_q, level_k, total in reversed(levels.levels):
        (_, right_q), (left_k, _) = _split(level_q, size), _split(level_k, size)
        between = blocks[:, :, size:, :size]
        d_q, d_k = _undouble(d_q, d_k, total, size, between @ left_k, between.mT @ right_q)
        blocks = jnp.stack([blocks[:, :, :size, :size], blocks[:, :, size:, size:]], axis=2)
        blocks = blocks.reshape(blocks.shape[0], -1, size, size)
    half_total = levels.query_factor.reshape(q.shape[0], -1, HALF, q.shape[-1])[:, :, -1]
    d_q, d_k = _undouble(d_q, d_k, half_total, HALF, 0, 0)
    for_q, for_k = _diagonal_factors(levels.query_factor, levels.key_factor)
    shape = (q.shape[0], -1, BLOCK, q.shape[-1])
    inside_q = (blocks @ (k * for_k).reshape(shape)).reshape(q.shape) * for_q
    inside_k = (blocks.mT @ (q * for_q).reshape(shape)).reshape(q.shape) * for_k
    return d_q * levels.query_factor + inside_q, d_k * levels.key_factor + inside_k


def _undouble(
    d_q: jax.Array, d_k: jax.Array, total: jax.Array, size: int, add_right_q: Any, add_left_k: Any
) -> tuple[jax.Array, jax.Array]:
    """The gradient of `_double` for q and k, plus what the blocks' own products give."""
    left_total, right_total = total[:, 0::2, None], total[:, 1::2, None]
    (left_q, right_q), (left_k, right_k) = _split(d_q, size), _split(d_k, size)
    d_q = _merge(left_q, right_q * left_total + add_right_q)
    return d_q, _merge(left_k * right_total + add_left_k, right_k)
