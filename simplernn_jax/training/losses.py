"""The loss of a language model, as a sum and a count so that any grouping gives the same mean."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from simplernn_jax.array_types import Activations, Logits, LossMask, Tokens
from simplernn_jax.ops import vocab_parallel

LOGITS_AT_ONCE = 2**24
"""Largest number of logits that `cross_entropy_of_hidden` makes before their loss is taken: 64 MiB
of float32."""


def cross_entropy(
    logits: Logits, targets: Tokens | np.ndarray, mask: LossMask | np.ndarray
) -> jax.Array:
    """``[B, T]``: -log p(target) of every position, in nats, and 0 where it is masked.

    Args:
      logits: ``[B, T, vocab]`` float32; on a mesh, of this device's part of the ids.
      targets: ``[B, T]`` ids in ``[0, vocab)``.
      mask: ``[B, T]``; where False, the position counts nothing, whatever its logits are, and
        its gradient is zero.
    """
    # Before the exponentials too: 0 times the gradient of a NaN would be NaN.
    logits = jnp.where(mask[..., None], logits, 0.0)
    nats = vocab_parallel.cross_entropy(logits, jnp.asarray(targets))
    return jnp.where(mask, nats, 0.0)


def summed_cross_entropy(
    logits: Logits, targets: Tokens | np.ndarray, mask: LossMask | np.ndarray
) -> jax.Array:
    """Sum over all positions of `cross_entropy`, with its arguments."""
    return jnp.sum(cross_entropy(logits, targets, mask))


def cross_entropy_of_hidden(
    logits_of: Callable[[jax.Array], Logits],
    hidden: Activations,
    targets: Tokens | np.ndarray,
    mask: LossMask | np.ndarray,
) -> jax.Array:
    """`summed_cross_entropy` of ``logits_of(hidden)``, of which there are never all at once.

    Where there are more than `LOGITS_AT_ONCE`, time is taken in parts, and the gradient computes
    the logits of each part again.

    Args:
      logits_of: what the head makes of ``[B, t, D]``.
      hidden: what it reads, ``[B, T, D]``.
      targets: as in `cross_entropy`.
      mask: as in `cross_entropy`.
    """
    length = hidden.shape[1]
    size = jax.eval_shape(logits_of, hidden).size
    parts = min(length, -(-size // LOGITS_AT_ONCE))
    if parts <= 1:
        return summed_cross_entropy(logits_of(hidden), targets, mask)
    each = -(-length // parts)

    def in_parts(x: jax.Array | np.ndarray) -> jax.Array:
        padding = [(0, 0), (0, -length % each), *[(0, 0)] * (x.ndim - 2)]
        padded = jnp.pad(x, padding) if length % each else jnp.asarray(x)
        return padded.reshape(x.shape[0], -1, each, *x.shape[2:]).swapaxes(0, 1)

    @jax.checkpoint
    def of_part(hidden: jax.Array, targets: jax.Array, mask: jax.Array) -> jax.Array:
        return summed_cross_entropy(logits_of(hidden), targets, mask)

    nats = jax.lax.map(lambda part: of_part(*part), tuple(map(in_parts, (hidden, targets, mask))))
    return jnp.sum(nats)
