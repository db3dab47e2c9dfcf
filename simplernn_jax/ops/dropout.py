"""Dropout that draws 16 random bits per value."""

import jax
import jax.numpy as jnp
from jax import lax

_LEVELS = 1 << 16


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zero each value with probability `rate`, and divide the others by 1 - rate (arXiv:1207.0580).

    Half of the random bits of `nnx.Dropout`, whose generator takes a sixth of the train step of a
    small model on CPUs; the rate, in [0, 1), is rounded to a multiple of 2^-16.
    `key` is typed; None is no dropout.
    """
    level = min(round(rate * _LEVELS), _LEVELS - 1)
    if key is None or level == 0:
        return x
    *leading, size = x.shape
    words = jax.random.bits(key, (*leading, -(-size // 2)), jnp.uint32)
    bits = lax.bitcast_convert_type(words, jnp.uint16).reshape(*leading, 2 * words.shape[-1])[
        ..., :size
    ]
    return jnp.where(bits >= jnp.uint16(level), x / (1 - level / _LEVELS), 0)
