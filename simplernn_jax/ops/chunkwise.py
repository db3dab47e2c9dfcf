"""The recurrence as matrix products over chunks of time, with its own gradient.

Notation, per head: l is the log gate, b_i its inclusive sum from the start of a chunk of C tokens,
S the state at the chunk's start. The chunk's output and next state are::

    y_i = (q_i e^{b_i})^T S + sum_{j <= i} A_ij v_j,     A_ij = sum_K q_i k_j e^{b_i - b_j}
    S'  = diag(e^{b_C}) S + sum_j (k_j e^{b_C - b_j}) v_j^T

e^{b_i - b_j} cannot be split into e^{b_i} e^{-b_j} (overflow), so A is a sum over levels. Blocks of
8 tokens refer both factors to their middle. Then blocks of 8, 16, 32 ... are joined in pairs: between
the left and the right block of a pair, q carries its decay since the start of its block and k its
decay to the end of its block, both at most 1. At the chunk's size q and k are just what the state
needs. Decays of longer stretches are products of those of shorter ones: one exponential per
element, and no sum of gates is ever subtracted from another. README.md derives the gradient.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from simplernn_jax.array_types import HeadState

BLOCK = 8
HALF = BLOCK // 2

Array = jax.Array


def chunkwise(
    q: Array,
    k: Array,
    v: Array,
    log_gate: Array,
    initial_state: HeadState,
    clear: Array | None,
    chunk_size: int | None,
) -> tuple[Array, HeadState]:
    """`scan` as one loop over chunks; same arguments and results."""
    length = q.shape[1]
    if chunk_size is None:
        chunk_size = choose_chunk_size(length, q.shape[3], v.shape[3])
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


def choose_chunk_size(length: int, key_dim: int, value_dim: int) -> int:
    """Tokens per chunk, measured on a CPU: large heads pay for larger chunks."""
    best = 64 if key_dim * value_dim > 64 * 64 else 32
    while best > BLOCK and best >= 2 * length:
        best //= 2
    return best


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(
    chunk_size: int,
    q: Array,
    k: Array,
    v: Array,
    log_gate: Array,
    initial_state: HeadState,
    clear: Array | None,
) -> tuple[Array, HeadState]:
    output, state, _ = _forward(chunk_size, q, k, v, log_gate, initial_state, clear, False)
    return output, state


def _chunked_fwd(
    chunk_size: int,
    q: Array,
    k: Array,
    v: Array,
    log_gate: Array,
    initial_state: HeadState,
    clear: Array | None,
) -> tuple[Any, Any]:
    output, state, starts = _forward(chunk_size, q, k, v, log_gate, initial_state, clear, True)
    return (output, state), (q, k, v, log_gate, clear, starts, state)


def _forward(
    chunk_size: int,
    q: Array,
    k: Array,
    v: Array,
    log_gate: Array,
    initial_state: HeadState,
    clear: Array | None,
    keep_states: bool,
) -> tuple[Array, HeadState, Array | None]:
    """Loops over chunks; keeps the state at the start of each if the gradient needs it."""
    batch, length, heads, _ = q.shape
    dtype = initial_state.dtype

    def body(carry: tuple[Array, Array], index: Array) -> tuple[tuple[Array, Array], Array | None]:
        state, output = carry
        part = partial(_slice_chunk, index=index, size=chunk_size, dtype=dtype)
        segments = _chunk_segments(clear, index, chunk_size, heads)
        decayed = _decay(part(q), part(k), part(log_gate), segments)
        chunk_v = part(v)
        chunk_output = decayed.read @ state
        for level in decayed.levels:
            chunk_output += (level.attention() @ level.split(chunk_v)).reshape(chunk_v.shape)
        next_state = decayed.total[:, :, None] * state + decayed.written.mT @ chunk_v
        output = _store_chunk(output, chunk_output, index, chunk_size)
        return (next_state, output), state if keep_states else None

    start = (initial_state.reshape(batch * heads, *initial_state.shape[2:]), jnp.zeros_like(v))
    (state, output), starts = jax.lax.scan(body, start, jnp.arange(length // chunk_size))
    return output, state.reshape(initial_state.shape), starts


def _chunked_bwd(chunk_size: int, residuals: Any, cotangents: Any) -> tuple[Any, ...]:
    """Loops over chunks from the last to the first, with the gradient of the state as carry."""
    q, k, v, log_gate, clear, starts, final_state = residuals
    d_output, d_final_state = cotangents
    length, heads = q.shape[1:3]
    dtype = final_state.dtype

    def body(carry: Any, inputs: tuple[Array, Array]) -> tuple[Any, None]:
        d_state, end_state, *gradients = carry
        index, state = inputs
        part = partial(_slice_chunk, index=index, size=chunk_size, dtype=dtype)
        segments = _chunk_segments(clear, index, chunk_size, heads)
        chunk_q, chunk_k, chunk_v, d_y = part(q), part(k), part(v), part(d_output)
        decayed = _decay(chunk_q, chunk_k, part(log_gate), segments)
        d_v = decayed.written @ d_state
        d_q = (d_y @ state.mT) * decayed.read_factor
        d_k = (chunk_v @ d_state.mT) * decayed.written_factor
        for level in decayed.levels:
            level_d_y = level.split(d_y)
            d_attention = level.mask(level_d_y @ level.split(chunk_v).mT)
            d_v += (level.attention().mT @ level_d_y).reshape(d_v.shape)
            d_q += (d_attention @ level.k).reshape(d_q.shape) * level.query_factor
            d_k += (d_attention.mT @ level.q).reshape(d_k.shape) * level.key_factor
        # b_i gathers q_i dq_i - k_i dk_i and b_C the whole end state; l_t is in every b_i, i >= t.
        d_b = chunk_q * d_q - chunk_k * d_k
        d_l = _sum_from_here(d_b) + jnp.sum(end_state * d_state, axis=-1)[:, None]
        if segments is not None:
            d_l = jnp.where(segments.clear[..., None], 0, d_l)
        d_state = decayed.total[:, :, None] * d_state + decayed.read.mT @ d_y
        stored = [
            _store_chunk(whole, chunk, index, chunk_size)
            for whole, chunk in zip(gradients, (d_q, d_k, d_v, d_l), strict=True)
        ]
        return (d_state, state, *stored), None

    flat = starts.shape[1:]
    zeros = [jnp.zeros_like(x) for x in (q, k, v, log_gate)]
    start = (d_final_state.reshape(flat), final_state.reshape(flat), *zeros)
    chunks = jnp.arange(length // chunk_size)
    (d_state, _, *gradients), _ = jax.lax.scan(body, start, (chunks, starts), reverse=True)
    return (*gradients, d_state.reshape(final_state.shape), None)


_chunked.defvjp(_chunked_fwd, _chunked_bwd)


def _slice_chunk(x: Array, *, index: Array, size: int, dtype: Any) -> Array:
    """Chunk `index` of ``[B, T, H, K]`` as ``[B * H, C, K]``."""
    chunk = jax.lax.dynamic_slice_in_dim(x, index * size, size, axis=1)
    batch, _, heads, width = chunk.shape
    return chunk.astype(dtype).swapaxes(1, 2).reshape(batch * heads, size, width)


def _store_chunk(whole: Array, chunk: Array, index: Array, size: int) -> Array:
    """Writes ``[B * H, C, K]`` back as chunk `index` of ``[B, T, H, K]``."""
    batch, _, heads, width = whole.shape
    chunk = chunk.reshape(batch, heads, size, width).swapaxes(1, 2).astype(whole.dtype)
    return jax.lax.dynamic_update_slice_in_dim(whole, chunk, index * size, axis=1)


def _sum_from_here(x: Array) -> Array:
    """``sum_{i >= t} x_i`` over axis 1, as a product with a triangle of ones."""
    size = x.shape[1]
    triangle = jnp.broadcast_to(jnp.tri(size, dtype=x.dtype).T, (x.shape[0], size, size))
    return triangle @ x


class Segments(NamedTuple):
    """Where segments lie in a chunk; N = B * H, every row of a batch has its own."""

    clear: Array  # [N, C] the token starts a segment
    number: Array  # [N, C] clears up to and including the token


def _chunk_segments(
    clear: Array | None, index: Array, size: int, heads: int
) -> Segments | None:
    if clear is None:
        return None
    chunk = jax.lax.dynamic_slice_in_dim(clear, index * size, size, axis=1)
    chunk = jnp.repeat(chunk, heads, axis=0)
    return Segments(chunk, jnp.cumsum(chunk.astype(jnp.int32), axis=1))


class Level(NamedTuple):
    """A part of A: pairs (i, j) inside blocks of `size` tokens, as one product per block."""

    size: int
    q: Array  # [N, C / size, size, K] decayed, zero where it reads nothing at this level
    k: Array  # [N, C / size, size, K]
    query_factor: Array  # [N, C, K] what q was multiplied by
    key_factor: Array  # [N, C, K]
    causal: bool  # a block of 8: its upper triangle must be masked
    number: Array | None  # [N, C] segments

    def split(self, x: Array) -> Array:
        """``[N, C, V]`` as ``[N, C / size, size, V]``."""
        return x.reshape(x.shape[0], -1, self.size, x.shape[-1])

    def attention(self) -> Array:
        """This level's entries of A: ``[N, C / size, size, size]``."""
        return self.mask(self.q @ self.k.mT)

    def mask(self, matrix: Array) -> Array:
        """Zero where j > i in blocks of 8 and between segments. `where`: inf * 0 would be NaN."""
        if self.causal:
            lower = jnp.tri(self.size, dtype=bool)
            matrix = jnp.where(lower[None, None], matrix, 0)
        if self.number is not None:
            number = self.split(self.number[..., None])
            matrix = jnp.where(number == number.mT, matrix, 0)
        return matrix


class Decayed(NamedTuple):
    """What a chunk's gates make of its q and k."""

    levels: list[Level]
    read: Array  # [N, C, K] q e^{b_i}, zero after the first clear
    written: Array  # [N, C, K] k e^{b_C - b_i}, zero before the last clear
    read_factor: Array  # [N, C, K]
    written_factor: Array  # [N, C, K]
    total: Array  # [N, K] e^{b_C}, zero if the chunk clears


def _floor(dtype: Any) -> float:
    # Half a block of floored gates must stay within the exponent's range: 4 * 16 = 64 < 87 for
    # float32, 4 * 75 = 300 < 708 for float64. A gate of e^-16 = 1e-7 is below float32's resolution.
    return -75.0 if dtype == jnp.float64 else -16.0


def _decay(q: Array, k: Array, log_gate: Array, segments: Segments | None) -> Decayed:
    """All factors of one chunk; inputs ``[N, C, K]``."""
    count, size, key_dim = q.shape
    number = None if segments is None else segments.number
    halves = (count, size // HALF, HALF, key_dim)
    gate = jnp.exp(jnp.maximum(log_gate, _floor(log_gate.dtype))).reshape(halves)
    since_start, to_end = _products_within(gate)
    total = since_start[:, :, -1]  # [N, C / 4, K]
    before = after = jnp.ones_like(total)

    levels = [_diagonal_level(q, k, since_start, to_end, number)]
    before, after, total = _join(before, after, total, 1)
    block = BLOCK
    while block < size:
        right = _is_right(size // HALF, block // HALF)
        query_factor = _spread(since_start, jnp.where(right, before, 0))
        key_factor = _spread(to_end, jnp.where(right, 0, after))
        shape = (count, -1, 2 * block, key_dim)
        level_q, level_k = (q * query_factor).reshape(shape), (k * key_factor).reshape(shape)
        levels.append(Level(2 * block, level_q, level_k, query_factor, key_factor, False, number))
        before, after, total = _join(before, after, total, block // HALF)
        block *= 2

    read_factor, written_factor = _spread(since_start, before), _spread(to_end, after)
    total = total[:, 0]
    if number is not None:
        last = number[:, -1:]
        read_factor = jnp.where((number == 0)[..., None], read_factor, 0)
        written_factor = jnp.where((number == last)[..., None], written_factor, 0)
        total = jnp.where(last == 0, total, 0)
    return Decayed(
        levels, q * read_factor, k * written_factor, read_factor, written_factor, total
    )


def _products_within(gate: Array) -> tuple[Array, Array]:
    """Products of the gates in half blocks ``[N, C / 4, 4, K]``: up to here, and after here."""
    place = jnp.arange(HALF)[None, None, :, None]
    since_start = to_end = jnp.ones_like(gate)
    for i in range(HALF):
        one = gate[:, :, i : i + 1]
        since_start = since_start * jnp.where(place >= i, one, 1)
        to_end = to_end * jnp.where(place < i, one, 1)
    return since_start, to_end


def _diagonal_level(
    q: Array, k: Array, since_start: Array, to_end: Array, number: Array | None
) -> Level:
    """Pairs inside blocks of 8, where both factors are relative to the middle."""
    right = _is_right(since_start.shape[1], 1)[:, :, None]
    nearer = jnp.where(right, since_start, to_end)
    inverse = 1 / nearer
    query_factor = jnp.where(right, nearer, inverse).reshape(q.shape)
    key_factor = jnp.where(right, inverse, nearer).reshape(q.shape)
    shape = (q.shape[0], -1, BLOCK, q.shape[-1])
    level_q, level_k = (q * query_factor).reshape(shape), (k * key_factor).reshape(shape)
    return Level(BLOCK, level_q, level_k, query_factor, key_factor, True, number)


def _is_right(halves: int, width: int) -> Array:
    """``[1, halves, 1]``: the half block lies in the right one of two blocks of `width` halves."""
    return (jnp.arange(halves) // width % 2 == 1)[None, :, None]


def _join(before: Array, after: Array, total: Array, width: int) -> tuple[Array, Array, Array]:
    """Joins pairs of blocks of `width` half blocks.

    `before` and `after` ``[N, C / 4, K]`` are the decays of a block before and after each of its
    half blocks; `total` ``[N, blocks, K]`` those of whole blocks.
    """
    left, right = total[:, 0::2], total[:, 1::2]
    is_right = _is_right(before.shape[1], width)
    before = before * jnp.where(is_right, jnp.repeat(left, 2 * width, axis=1), 1)
    after = after * jnp.where(is_right, 1, jnp.repeat(right, 2 * width, axis=1))
    return before, after, left * right


def _spread(within: Array, outside: Array) -> Array:
    """``[N, C / 4, 4, K]`` decays within half blocks times those outside: ``[N, C, K]``."""
    return (within * outside[:, :, None]).reshape(within.shape[0], -1, within.shape[-1])
