"""Causal softmax attention over a sliding window, in memory linear in T.

Queries are processed in blocks, each with the keys that it may attend to. A compiled loop goes
through the blocks of a long sequence, and the gradient recomputes their scores.
"""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from simplernn_jax.array_types import Positions, Queries, SeenKeys, SeenValues
from simplernn_jax.ops.checks import BOOL, INTEGER, accumulator_dtype, check_array

QUERY_BLOCK = 256
"""Queries of one block, which attends to at most `context` + 255 keys."""

ROTARY_BASE = 10_000.0
"""Base of the RoPE frequencies, theta_i = base^(-2i/K) (arXiv:2104.09864, section 3.2.2)."""


def apply_rope(x: jax.Array, positions: Positions) -> jax.Array:
    """Apply rotary position embeddings (RoFormer, arXiv:2104.09864, eq. 34).

    In the half-split (GPT-NeoX) layout: channel i is paired with i + K/2. The dot product of two
    rotated vectors depends on the difference of their positions. Angles are integers in units of
    2^-32 turns, which wrap as angles do: they are exact at any position, where float32 angles would
    be off by 4e-3 after 100,000 tokens.

    Args:
      x: ``[B, T, H, K]``, K even.
      positions: ``[B or 1, T]`` integers, modulo 2^32.

    Returns:
      ``[B, T, H, K]`` of x's dtype, computed in float32 (float64 if x is).
    """
    sizes = check_array("x", x, "B T H K")
    check_array("positions", positions, "B? T", INTEGER, sizes)
    if sizes["K"] % 2:
        raise ValueError(f"x: expected [B, T, H, K] with an even K; got K = {sizes['K']}")
    half = x.shape[-1] // 2
    dtype = accumulator_dtype(x)
    frequency = ROTARY_BASE ** (-np.arange(half) / half)
    turns_per_token = np.rint(frequency / (2 * np.pi) * 2**32).astype(np.int32)
    turns = jnp.asarray(positions, jnp.int32)[..., None] * turns_per_token[None, None]
    angle = turns.astype(dtype) * (2 * np.pi / 2**32)
    cos, sin = jnp.cos(angle)[:, :, None], jnp.sin(angle)[:, :, None]
    first, second = jnp.split(x.astype(dtype), 2, axis=-1)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


def attend(q: Queries, k: SeenKeys, v: SeenValues, mask: jax.Array) -> jax.Array:
    """Compute softmax attention of T queries over S keys; every query attends to at least one.

    Args:
      q: ``[B, T, H, K]``; scaled by 1/sqrt(K) here.
      k: ``[B, S, H, K]``.
      v: ``[B, S, H, V]``.
      mask: ``[B or 1, T, S]``, True where the query attends to the key.

    Returns:
      ``[B, T, H, V]`` of the inputs' dtype; scores and softmax in float32 (float64 if q is).
    """
    sizes = _check_heads(q, k, v)
    check_array("mask", mask, "B? T S", BOOL, sizes)
    dtype, scale = accumulator_dtype(q), max(sizes["K"], 1) ** -0.5
    scores = jnp.einsum("bthk,bshk->bhts", q, k, preferred_element_type=dtype) * scale
    scores = jnp.where(mask[:, None], scores, jnp.finfo(dtype).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    return jnp.einsum("bhts,bshv->bthv", weights, v)


def sliding_attention(
    q: Queries, k: SeenKeys, v: SeenValues, visible: jax.Array, context: int
) -> jax.Array:
    """Compute causal attention over the last tokens.

    Args:
      q: ``[B, T, H, K]``.
      k: ``[B, P + T, H, K]``, with the keys of P earlier tokens first.
      v: ``[B, P + T, H, V]``.
      visible: ``[B or 1, T]`` int32: number of keys each query attends to, including its own;
        at least 1, and at most `context` and the number of tokens up to its own.
      context: upper bound of `visible`; earlier keys are not read.

    Returns:
      ``[B, T, H, V]`` of the inputs' dtype.
    """
    sizes = _check_heads(q, k, v)
    check_array("visible", visible, "B? T", INTEGER, sizes)
    if k.shape[1] < q.shape[1]:
        raise ValueError(
            f"k: expected [B, S, H, K] with S at least T = {q.shape[1]}; got S = {k.shape[1]}"
        )
    if context < 1:
        raise ValueError(f"context: expected at least 1; got {context}")
    length, past = q.shape[1], k.shape[1] - q.shape[1]
    if length <= QUERY_BLOCK:
        return _block(q, k, v, visible, 0, length, past + length)
    part_size = max(context, QUERY_BLOCK)
    count = max(1, length // part_size)
    first_keys = slice(past + part_size)
    parts = [
        _attend_blocks(
            q[:, :part_size], k[:, first_keys], v[:, first_keys], visible[:, :part_size], context
        )
    ]
    if count > 1:

        def split(x: jax.Array, first: int) -> jax.Array:
            x = x[:, first : first + (count - 1) * part_size]
            x = x.reshape(x.shape[0], count - 1, part_size, *x.shape[2:])
            return jnp.moveaxis(x, 1, 0)

        def middle(parts: tuple[jax.Array, ...]) -> jax.Array:
            q, k_before, k, v_before, v, visible = parts
            k, v = jnp.concatenate([k_before, k], 1), jnp.concatenate([v_before, v], 1)
            return _attend_blocks(q, k, v, visible, context)

        starts = (part_size, past, past + part_size, past, past + part_size, part_size)
        inputs = tuple(map(split, (q, k, k, v, v, visible), starts))
        parts.append(_join(jax.lax.map(middle, inputs)))
    if rest := max(0, length - count * part_size):
        keys = slice(-(part_size + rest), None)
        parts.append(
            _attend_blocks(q[:, -rest:], k[:, keys], v[:, keys], visible[:, -rest:], context)
        )
    return jnp.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]


def _check_heads(q: Queries, k: SeenKeys, v: SeenValues) -> dict[str, Any]:
    sizes = check_array("q", q, "B T H K")
    like_q = (str(q.dtype),)
    sizes = check_array("k", k, "B S H K", like_q, sizes)
    return check_array("v", v, "B S H V", like_q, sizes)


def _attend_blocks(
    q: Queries, k: SeenKeys, v: SeenValues, visible: jax.Array, context: int
) -> jax.Array:
    """Compute `sliding_attention` of a part of the sequence, in blocks of `QUERY_BLOCK`."""
    length, past = q.shape[1], k.shape[1] - q.shape[1]
    # The scores are by far the largest arrays: the gradient recomputes them.
    block = jax.checkpoint(_block, static_argnums=(5, 6))
    parts = []
    for start, stop in _spans(length, past, context):
        whole, rest = divmod(stop - start, QUERY_BLOCK)
        if whole:
            width = min(past + stop, context - 1 + QUERY_BLOCK)
            starts = start + QUERY_BLOCK * jnp.arange(whole, dtype=jnp.int32)
            one = functools.partial(
                lambda width, at: block(q, k, v, visible, at, QUERY_BLOCK, width), width
            )
            parts.append(_join(jax.lax.map(one, starts)))
        if rest:
            width = min(past + stop, context - 1 + rest)
            parts.append(block(q, k, v, visible, stop - rest, rest, width))
    return jnp.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]


def _block(
    q: Queries, k: SeenKeys, v: SeenValues, visible: jax.Array, start: Any, size: int, width: int
) -> jax.Array:
    """Compute attention of `size` queries from `start`, over the last `width` keys up to them."""
    end = k.shape[1] - q.shape[1] + start + size
    first = jnp.maximum(end - width, 0)
    k, v = (jax.lax.dynamic_slice_in_dim(x, first, width, 1) for x in (k, v))
    q, visible = (jax.lax.dynamic_slice_in_dim(x, start, size, 1) for x in (q, visible))
    queries = end - size + jnp.arange(size, dtype=jnp.int32)
    keys = first + jnp.arange(width, dtype=jnp.int32)
    steps_back = queries[:, None] - keys[None]
    mask = (steps_back >= 0)[None] & (steps_back[None] < visible[:, :, None])
    return attend(q, k, v, mask)


def _spans(length: int, past: int, context: int) -> list[tuple[int, int]]:
    """Divide queries into spans with the same number of keys, doubling up to `context`.

    In all spans but the first, at most a quarter of the scores are masked as later than the query.
    """
    edges, edge = [0], QUERY_BLOCK
    while edge < length and past + edge <= context:
        edges.append(edge)
        edge *= 2
    return list(itertools.pairwise([*edges, length]))


def _join(blocks: jax.Array) -> jax.Array:
    """Reshape ``[n, B, t, H, V]`` to ``[B, n t, H, V]``."""
    number, batch, length, *rest = blocks.shape
    return jnp.moveaxis(blocks, 0, 1).reshape(batch, number * length, *rest)
