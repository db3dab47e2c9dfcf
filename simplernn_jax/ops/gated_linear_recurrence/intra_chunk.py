"""Weights between the tokens of one chunk, built by joining blocks of tokens pairwise.

With l the log gate and b_i its inclusive sum from the chunk's start, ::

    A_ij = sum_K q_i k_j e^{b_i - b_j}    for j <= i

e^{b_i - b_j} cannot be split into e^{b_i} e^{-b_j} (overflow), so A is built hierarchically
(compare secondary-level chunking, arXiv:2312.06635, section 4.3). In blocks of 8 tokens both
factors are relative to the block's midpoint. Then the block size is doubled, 8 to 16 to 32 ...: A
between a left and a right block is ``q_right (k_left)^T`` where q carries its decay since the start
of its block and k its decay to the end of its block, both at most 1. After joining, the right q and
the left k are multiplied by the other block's total decay. At the chunk's size, they are the q and
k that the state needs. docs/recurrence.md derives the gradient and lists errors.

All arrays are ``[N, C, ...]``: N independent chunks.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

BLOCK = 8
HALF = BLOCK // 2


class Levels(NamedTuple):
    """Results of the hierarchy: A, and the decayed q and k of each level and of the chunk."""

    query_factor: jax.Array  # [N, C, K] decay of q since the start of its half block
    key_factor: jax.Array  # [N, C, K] decay of k to the end of its half block
    levels: list[tuple[int, jax.Array, jax.Array, jax.Array]]  # (size, q, k, total decay)
    decayed_q: jax.Array  # [N, C, K] q e^{b_i}
    decayed_k: jax.Array  # [N, C, K] k e^{b_C - b_i}
    total: jax.Array  # [N, K] e^{b_C}
    attention: jax.Array  # [N, C, C] A, without segment mask


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
