"""Causal softmax attention over the last tokens, in memory that does not grow with T times T.

Queries are taken in blocks, each with the keys that it may see. Blocks of a long sequence follow
one another in a compiled loop, and their scores are computed again for the gradient.
"""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from simplernn_jax.array_types import Keys, Positions, Queries, Values
from simplernn_jax.ops.checks import BOOL, INTEGER, check_array

QUERIES = 256
"""Queries of one block: `context` + 255 keys at most go with them."""

ROTARY_BASE = 10_000.0
"""Slowest and fastest rotation differ by this factor, as in arXiv:2104.09864, section 3.2.2."""


def apply_rope(x: jax.Array, positions: Positions) -> jax.Array:
    """Turns pairs of channels by an angle in proportion to the position (RoFormer, eq. 34).

    The product of two rotated vectors depends on the difference of their positions. Angles are
    counted in 2^-32 of a turn by integers, which wrap as a turn does: a difference gives the same
    angle at any position, where a float32 product would be off by 4e-3 after 100,000 tokens.

    Args:
      x: ``[B, T, H, K]``, K even; channel i is paired with channel i + K/2.
      positions: ``[B or 1, T]`` int32.

    Returns:
      ``[B, T, H, K]`` of x's dtype, computed in float32 at least.

    Raises:
      ValueError: wrong ranks, shapes that do not fit together, or K is odd.
      TypeError: wrong dtypes.
    """
    sizes = check_array("x", x, "B T H K")
    check_array("positions", positions, "B? T", INTEGER, sizes)
    if sizes["K"] % 2:
        raise ValueError(f"x: expected [B, T, H, K] with an even K; got K = {sizes['K']}")
    half = x.shape[-1] // 2
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    radians = ROTARY_BASE ** (-np.arange(half) / half)
    turn = np.rint(radians / (2 * np.pi) * 2**32).astype(np.int32)
    angle = (positions[..., None] * turn[None, None]).astype(dtype) * (2 * np.pi / 2**32)
    cos, sin = jnp.cos(angle)[:, :, None], jnp.sin(angle)[:, :, None]
    first, second = jnp.split(x.astype(dtype), 2, axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def attend(q: Queries, k: Keys, v: Values, mask: jax.Array) -> jax.Array:
    """Softmax attention of T queries over S keys, which every query sees some of.

    Args:
      q: ``[B, T, H, K]``; scaled by 1/sqrt(K) here.
      k: ``[B, S, H, K]``.
      v: ``[B, S, H, V]``.
      mask: ``[B or 1, T, S]``, True where the query sees the key.

    Returns:
      ``[B, T, H, V]`` of the inputs' dtype; scores and softmax are float32 (float64 if they are).

    Raises:
      ValueError: wrong ranks, or shapes that do not fit together.
      TypeError: wrong dtypes; those of q, k and v must be the same.
    """
    sizes = _check_heads(q, k, v)
    check_array("mask", mask, "B? T S", BOOL, sizes)
    key_dim, value_dim = k.shape[-1], v.shape[-1]
    if q.shape[2] == 0:  # the library divides by the number of heads
        return jnp.zeros((*q.shape[:3], value_dim), q.dtype)
    if q.dtype == jnp.float64:  # the library's softmax is float32 whatever it is given
        scores = jnp.einsum("bthk,bshk->bhts", q, k) * key_dim**-0.5
        weights = jax.nn.softmax(jnp.where(mask[:, None], scores, -jnp.inf), axis=-1)
        return jnp.einsum("bhts,bshv->bthv", weights, v)

    def widen(x: jax.Array) -> jax.Array:
        # The library wants one width; channels of zeros add nothing to a product.
        missing = max(key_dim, value_dim) - x.shape[-1]
        return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, missing))) if missing else x

    y = jax.nn.dot_product_attention(
        widen(q), widen(k), widen(v), mask=mask[:, None], scale=key_dim**-0.5
    )
    return y[..., :value_dim]


def sliding_attention(q: Queries, k: Keys, v: Values, reach: jax.Array, context: int) -> jax.Array:
    """Attention of every query over its own token and the ones before it.

    Args:
      q: ``[B, T, H, K]``.
      k: ``[B, P + T, H, K]``, those of P earlier tokens first.
      v: ``[B, P + T, H, V]``.
      reach: ``[B or 1, T]`` int32: how many tokens a query sees, its own included; at least 1,
        and at most `context` and what there is.
      context: bound of `reach`: keys further back than this are not touched.

    Returns:
      ``[B, T, H, V]`` of the inputs' dtype.

    Raises:
      ValueError: wrong ranks, shapes that do not fit together, fewer keys than queries, or a
        `context` below 1.
      TypeError: wrong dtypes; those of q, k and v must be the same.
    """
    sizes = _check_heads(q, k, v)
    check_array("reach", reach, "B? T", INTEGER, sizes)
    if k.shape[1] < q.shape[1]:
        raise ValueError(
            f"k: expected [B, S, H, K] with S at least T = {q.shape[1]}; got S = {k.shape[1]}"
        )
    if context < 1:
        raise ValueError(f"context: expected at least 1; got {context}")
    length, past = q.shape[1], k.shape[1] - q.shape[1]
    if length <= QUERIES:
        return _block(q, k, v, reach, 0, length, past + length)
    stretch = max(context, QUERIES)
    whole = max(1, length // stretch)
    parts = [
        _stretch(
            q[:, :stretch],
            k[:, : past + stretch],
            v[:, : past + stretch],
            reach[:, :stretch],
            context,
        )
    ]
    if whole > 1:

        def split(x: jax.Array, first: int) -> jax.Array:
            x = x[:, first : first + (whole - 1) * stretch]
            x = x.reshape(x.shape[0], whole - 1, stretch, *x.shape[2:])
            return jnp.moveaxis(x, 1, 0)

        def middle(parts: tuple[jax.Array, ...]) -> jax.Array:
            q, k_before, k, v_before, v, reach = parts
            k, v = jnp.concatenate([k_before, k], 1), jnp.concatenate([v_before, v], 1)
            return _stretch(q, k, v, reach, context)

        inputs = (
            split(q, stretch),
            split(k, past),
            split(k, past + stretch),
            split(v, past),
            split(v, past + stretch),
            split(reach, stretch),
        )
        parts.append(_join(jax.lax.map(middle, inputs)))
    if rest := max(0, length - whole * stretch):
        window = slice(-(stretch + rest), None)
        parts.append(_stretch(q[:, -rest:], k[:, window], v[:, window], reach[:, -rest:], context))
    return jnp.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]


def _check_heads(q: Queries, k: Keys, v: Values) -> dict[str, Any]:
    sizes = check_array("q", q, "B T H K")
    like_q = (str(q.dtype),)
    sizes = check_array("k", k, "B S H K", like_q, sizes)
    return check_array("v", v, "B S H V", like_q, sizes)


def _stretch(q: Queries, k: Keys, v: Values, reach: jax.Array, context: int) -> jax.Array:
    """`sliding_attention` over so few tokens that a loop may address all their keys."""
    length, past = q.shape[1], k.shape[1] - q.shape[1]
    # Scores are not kept for the gradient: they are the largest arrays by far.
    block = jax.checkpoint(_block, static_argnums=(5, 6))
    parts = []
    for start, stop in _spans(length, past, context):
        whole, rest = divmod(stop - start, QUERIES)
        if whole:
            width = min(past + stop, context - 1 + QUERIES)
            starts = start + QUERIES * jnp.arange(whole)
            one = functools.partial(
                lambda width, at: block(q, k, v, reach, at, QUERIES, width), width
            )
            parts.append(_join(jax.lax.map(one, starts)))
        if rest:
            width = min(past + stop, context - 1 + rest)
            parts.append(block(q, k, v, reach, stop - rest, rest, width))
    return jnp.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]


def _block(
    q: Queries, k: Keys, v: Values, reach: jax.Array, start: Any, size: int, width: int
) -> jax.Array:
    """Attention of `size` queries from `start` on, over the last `width` keys up to their end."""
    end = k.shape[1] - q.shape[1] + start + size
    first = jnp.maximum(end - width, 0)
    k, v = (jax.lax.dynamic_slice_in_dim(x, first, width, 1) for x in (k, v))
    q, reach = (jax.lax.dynamic_slice_in_dim(x, start, size, 1) for x in (q, reach))
    steps_back = (end - size + jnp.arange(size))[:, None] - (first + jnp.arange(width))[None]
    mask = (steps_back >= 0)[None] & (steps_back[None] < reach[:, :, None])
    return attend(q, k, v, mask)


def _spans(length: int, past: int, context: int) -> list[tuple[int, int]]:
    """Queries that share one number of keys: twice as many each time, until `context` is reached.

    Of the scores of all but the first, at most a quarter are of keys that come after the query.
    """
    edges, edge = [0], QUERIES
    while edge < length and past + edge <= context:
        edges.append(edge)
        edge *= 2
    return list(itertools.pairwise([*edges, length]))


def _join(blocks: jax.Array) -> jax.Array:
    """``[n, B, t, H, V]`` to ``[B, n t, H, V]``."""
    blocks = jnp.moveaxis(blocks, 0, 1)
    return blocks.reshape(blocks.shape[0], -1, *blocks.shape[3:])
