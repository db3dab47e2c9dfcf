"""Loss of a language model, summed, so that any grouping of tokens gives the same mean."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from simplernn_jax.array_types import Activations, Logits, LossMask, Tokens
from simplernn_jax.ops import vocab_parallel

LOGITS_AT_ONCE = 2**24
"""Largest number of logits that `cross_entropy_of_hidden` computes at once: 64 MiB of float32."""


def cross_entropy(
    logits: Logits, targets: Tokens | np.ndarray, mask: LossMask | np.ndarray
) -> jax.Array:
    """-log p(target) of every position, ``[B, T]``, in nats; 0 where it is masked.

    Args:
      logits: ``[B, T, vocab]`` float32; on a mesh, ``[B, T, vocab / tensor]``.
      targets: ``[B, T]`` ids in ``[0, vocab)``.
      mask: ``[B, T]``; where False, loss and gradient are zero, whatever the logits are.
    """
    # Before the exponentials too: 0 times the gradient of a NaN would be NaN.
    logits = jnp.where(mask[..., None], logits, 0.0)
    nats = vocab_parallel.cross_entropy(logits, jnp.asarray(targets))
    return jnp.where(mask, nats, 0.0)


def summed_cross_entropy(
    logits: Logits, targets: Tokens | np.ndarray, mask: LossMask | np.ndarray
) -> jax.Array:
    """Sum of `cross_entropy` over all positions; same arguments."""
    return jnp.sum(cross_entropy(logits, targets, mask))


def cross_entropy_of_hidden(
    logits_of: Callable[[jax.Array], Logits],
    hidden: Activations,
    targets: Tokens | np.ndarray,
    mask: LossMask | np.ndarray,
) -> jax.Array:
    """`summed_cross_entropy` of ``logits_of(hidden)``, without all logits in memory.

    More than `LOGITS_AT_ONCE` are computed in parts of the sequences, and recomputed for the
    gradient.

    Args:
      logits_of: the head, a function of ``[B, t, D]``.
      hidden: its input, ``[B, T, D]``.
      targets: as in `cross_entropy`.
      mask: as in `cross_entropy`.
    """
    length = hidden.shape[1]
    size = jax.eval_shape(logits_of, hidden).size
    parts = min(length, -(-size // LOGITS_AT_ONCE))
    if parts <= 1:
        return summed_cross_entropy(logits_of(hidden), targets, mask)
    each = -(-length // parts)

    def split(x: jax.Array | np.ndarray) -> jax.Array:
        padding = [(0, 0), (0, -length % each), *[(0, 0)] * (x.ndim - 2)]
        padded = jnp.pad(x, padding) if length % each else jnp.asarray(x)
        return padded.reshape(x.shape[0], -1, each, *x.shape[2:]).swapaxes(0, 1)

    @jax.checkpoint
    def loss_of_part(hidden: jax.Array, targets: jax.Array, mask: jax.Array) -> jax.Array:
        return summed_cross_entropy(logits_of(hidden), targets, mask)

    nats = jax.lax.map(lambda part: loss_of_part(*part), tuple(map(split, (hidden, targets, mask))))
    return jnp.sum(nats)
