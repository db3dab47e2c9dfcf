"""The recurrence as matrix products over chunks of time, with its own gradient.

Notation, per head: l is the log gate, b_i its inclusive sum from the start of a chunk of C tokens,
S the state at the chunk's start. The chunk's output and next state are::

    y_i = (q_i e^{b_i})^T S + sum_{j <= i} A_ij v_j,     A_ij = sum_K q_i k_j e^{b_i - b_j}
    S'  = diag(e^{b_C}) S + sum_j (k_j e^{b_C - b_j}) v_j^T

`doubling.py` makes A and the decayed q and k, for several chunks at once; then their states follow
one from another, and the rest is products over all of them again. README.md derives it and its
gradient.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from simplernn_jax.array_types import HeadState
from simplernn_jax.ops.doubling import BLOCK, Levels, join_blocks, join_blocks_gradient
from simplernn_jax.ops.manual_axes import vary_like

GROUP_ELEMENTS = 2**18
"""Largest array of one group of chunks: 1 MiB of float32 stays in a core's cache, and fewer, larger
operations cost less than many small ones."""

MAX_GROUP = 16
"""Most chunks of a group; their states are computed one after another, in unrolled code."""


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
    group = choose_group(
        q.shape[0] * q.shape[2],
        chunk_size,
        q.shape[3],
        v.shape[3],
        (length + padding) // chunk_size,
    )
    whole = (length + padding) // (chunk_size * group) * chunk_size * group
    outputs, state = [], initial_state
    for part in (slice(0, whole), slice(whole, length + padding)):
        size = (part.stop - part.start) // chunk_size
        if size:
            inputs = (q[:, part], k[:, part], v[:, part], log_gate[:, part])
            part_clear = None if clear is None else clear[:, part]
            output, state = _chunked(chunk_size, min(group, size), *inputs, state, part_clear)
            outputs.append(output)
    output = outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=1)
    return output[:, :length], state


def choose_group(rows: int, chunk_size: int, key_dim: int, value_dim: int, chunks: int) -> int:
    """Chunks per group: a power of two, by the size of their arrays and states."""
    elements = rows * max(chunk_size * max(key_dim, value_dim), key_dim * value_dim)
    group = 1
    while 2 * group <= min(MAX_GROUP, chunks) and 2 * group * elements <= GROUP_ELEMENTS:
        group *= 2
    return group


def choose_chunk_size(length: int) -> int:
    """Tokens per chunk: 32 measured fastest, or near it, for heads of 32, 64 and 128 on a CPU."""
    best = 32
    while best > BLOCK and best >= 2 * length:
        best //= 2
    return best


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _chunked(
    chunk_size: int,
    group: int,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_gate: jax.Array,
    initial_state: HeadState,
    clear: jax.Array | None,
) -> tuple[jax.Array, HeadState]:
    output, final_state, _ = _forward(
        chunk_size, group, q, k, v, log_gate, initial_state, clear, False
    )
    return output, final_state


def _chunked_fwd(
    chunk_size: int,
    group: int,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_gate: jax.Array,
    initial_state: HeadState,
    clear: jax.Array | None,
) -> tuple[Any, Any]:
    output, final_state, starts = _forward(
        chunk_size, group, q, k, v, log_gate, initial_state, clear, True
    )
    return (output, final_state), (q, k, v, log_gate, clear, starts, final_state)


def _forward(
    chunk_size: int,
    group: int,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_gate: jax.Array,
    initial_state: HeadState,
    clear: jax.Array | None,
    keep_states: bool,
) -> tuple[jax.Array, HeadState, jax.Array | None]:
    """Loops over groups of chunks; keeps the states at their chunks' starts for the gradient."""
    batch, length, heads, _ = q.shape
    dtype = initial_state.dtype
    states = (group, batch * heads, *initial_state.shape[2:])

    def body(carry: Any, index: jax.Array) -> tuple[Any, jax.Array | None]:
        state, output = carry
        part = partial(_slice_group, index=index, group=group, size=chunk_size, dtype=dtype)
        chunk_q, chunk_k, chunk_v, chunk_l = part(q), part(k), part(v), part(log_gate)
        levels = join_blocks(chunk_q, chunk_k, chunk_l)
        masks = _chunk_masks(clear, index, group, chunk_size, heads)
        attention, read, written, total = _masked(levels, masks)
        added = (written.mT @ chunk_v).reshape(states)
        total = total.reshape(*states[:3], 1)
        at_starts = []
        for decay, new in zip(total, added, strict=True):
            at_starts.append(state)
            state = decay * state + new
        starts = jnp.stack(at_starts)
        chunk_output = read @ starts.reshape(-1, *states[2:]) + attention @ chunk_v
        output = _store_group(output, chunk_output, index, group, chunk_size)
        return (state, output), starts if keep_states else None

    # Collected in `dtype`: XLA's CPU backend converts a whole bfloat16 array to update a part.
    zeros = vary_like(jnp.zeros(v.shape, dtype), initial_state)
    start = (initial_state.reshape(states[1:]), zeros)
    groups = jnp.arange(length // (chunk_size * group))
    (state, output), starts = jax.lax.scan(body, start, groups)
    return output.astype(v.dtype), state.reshape(initial_state.shape), starts


def _chunked_bwd(chunk_size: int, group: int, residuals: Any, cotangents: Any) -> tuple[Any, ...]:
    """Loops over chunks from the last to the first, with the gradient of the state as carry."""
    q, k, v, log_gate, clear, starts, final_state = residuals
    d_output, d_final_state = cotangents
    batch, length, heads, _ = q.shape
    dtype = final_state.dtype
    states = (group, batch * heads, *final_state.shape[2:])

    def body(carry: Any, xs: Any) -> tuple[Any, None]:
        d_state, end_state, d_q, d_k, d_v, d_l = carry
        index, starts = xs
        part = partial(_slice_group, index=index, group=group, size=chunk_size, dtype=dtype)
        chunk_q, chunk_k, chunk_v, chunk_l = part(q), part(k), part(v), part(log_gate)
        chunk_dy = part(d_output)
        levels = join_blocks(chunk_q, chunk_k, chunk_l)
        masks = _chunk_masks(clear, index, group, chunk_size, heads)
        attention, read, written, total = _masked(levels, masks)

        ends = jnp.concatenate([starts[1:], end_state[None]])
        read_by = (read.mT @ chunk_dy).reshape(states)
        decays = total.reshape(*states[:3], 1)
        d_ends = []
        for chunk in reversed(range(group)):
            d_ends.append(d_state)
            d_state = decays[chunk] * d_state + read_by[chunk]
        d_end = jnp.stack(d_ends[::-1]).reshape(-1, *states[2:])
        state = starts.reshape(-1, *states[2:])

        d_attention = _causal(chunk_dy @ chunk_v.mT, masks)
        chunk_dv = attention.mT @ chunk_dy + written @ d_end
        d_read, d_written = chunk_dy @ state.mT, chunk_v @ d_end.mT
        if masks is not None:
            d_read = jnp.where(masks.reads_start[..., None], d_read, 0)
            d_written = jnp.where(masks.reaches_end[..., None], d_written, 0)
        chunk_dq, chunk_dk = join_blocks_gradient(
            levels, chunk_q, chunk_k, d_attention, d_read, d_written
        )
        # b_i gathers q_i dq_i - k_i dk_i and b_C the whole end state; l_t is in every b_i, i >= t.
        d_b = chunk_q * chunk_dq - chunk_k * chunk_dk
        d_total = jnp.sum(ends.reshape(d_end.shape) * d_end, axis=-1)
        chunk_dl = jnp.flip(jnp.cumsum(jnp.flip(d_b, 1), axis=1), 1) + d_total[:, None]
        if masks is not None:
            chunk_dl = jnp.where(masks.clear[..., None], 0, chunk_dl)
        store = partial(_store_group, index=index, group=group, size=chunk_size)
        grads = (store(d_q, chunk_dq), store(d_k, chunk_dk), store(d_v, chunk_dv))
        return (d_state, starts[0], *grads, store(d_l, chunk_dl)), None

    start = (
        d_final_state.reshape(states[1:]),
        final_state.reshape(states[1:]),
        *(vary_like(jnp.zeros(x.shape, dtype), final_state) for x in (q, k, v, log_gate)),
    )
    chunks = jnp.arange(length // (chunk_size * group))
    (d_state, _, *grads), _ = jax.lax.scan(body, start, (chunks, starts), reverse=True)
    grads = [grad.astype(x.dtype) for grad, x in zip(grads, (q, k, v, log_gate), strict=True)]
    return (*grads, d_state.reshape(final_state.shape), None)


_chunked.defvjp(_chunked_fwd, _chunked_bwd)


def _slice_group(x: jax.Array, *, index: jax.Array, group: int, size: int, dtype: Any) -> jax.Array:
    """Chunks of group `index` of ``[B, T, H, K]`` as ``[G * B * H, C, K]``."""
    batch, _, heads, width = x.shape
    chunk = jax.lax.dynamic_slice_in_dim(x, index * size * group, size * group, axis=1)
    chunk = chunk.astype(dtype).reshape(batch, group, size, heads, width)
    return chunk.transpose(1, 0, 3, 2, 4).reshape(-1, size, width)


def _store_group(
    whole: jax.Array, chunk: jax.Array, index: jax.Array, group: int, size: int
) -> jax.Array:
    """Writes ``[G * B * H, C, K]`` back as group `index` of ``[B, T, H, K]``."""
    batch, _, heads, width = whole.shape
    chunk = chunk.reshape(group, batch, heads, size, width).transpose(1, 0, 3, 2, 4)
    chunk = chunk.reshape(batch, group * size, heads, width)
    return jax.lax.dynamic_update_slice_in_dim(whole, chunk, index * size * group, axis=1)


class Masks(NamedTuple):
    """Which paths inside a chunk stay within one segment; every row of a batch has its own."""

    clear: jax.Array  # [N, C] the token starts a segment
    reads_start: jax.Array  # [N, C] the state at the chunk's start reaches the token
    reaches_end: jax.Array  # [N, C] the token reaches the state at the chunk's end
    same_segment: jax.Array  # [N, C, C]
    uncleared: jax.Array  # [N, 1] the state at the start reaches the end


def _chunk_masks(
    clear: jax.Array | None, index: jax.Array, group: int, size: int, heads: int
) -> Masks | None:
    if clear is None:
        return None
    chunk = jax.lax.dynamic_slice_in_dim(clear, index * size * group, size * group, axis=1)
    chunk = chunk.reshape(-1, group, size).swapaxes(0, 1).reshape(-1, size)
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
