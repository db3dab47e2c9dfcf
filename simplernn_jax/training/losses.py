"""Cross-entropy of every target."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from simplernn_jax.array_types import Activations, Logits, LossMask, Tokens
from simplernn_jax.parallel import tensor

MAX_LOGITS = 2**24
"""Maximum number of logits that `chunked_cross_entropy` computes at once: 64 MiB of float32."""


def cross_entropy(
    logits: Logits, targets: Tokens | np.ndarray, mask: LossMask | np.ndarray
) -> jax.Array:
    """Return the negative log-likelihood of each target in nats, ``[B, T]`` float32; 0 if masked.

    Args:
      logits: ``[B, T, vocab]`` float32; on a mesh, ``[B, T, vocab / tensor]``.
      targets: ``[B, T]`` integer ids in ``[0, vocab)``.
      mask: ``[B, T]`` bool; where False, loss and gradient are zero, even if the logits are NaN.

    Raises:
      TypeError: `targets` are not integers.
    """
    # Before the exponentials too: 0 times the gradient of a NaN would be NaN.
    logits = jnp.where(mask[..., None], logits, 0.0)
    nll = tensor.cross_entropy(logits, jnp.asarray(targets))
    return jnp.where(mask, nll, 0.0)


def chunked_cross_entropy(
    logits_fn: Callable[[jax.Array], Logits],
    hidden: Activations,
    targets: Tokens | np.ndarray,
    mask: LossMask | np.ndarray,
) -> jax.Array:
    """Return `cross_entropy` of ``logits_fn(hidden)``, without all logits in memory.

    More than `MAX_LOGITS` are computed in chunks along time, and recomputed in the backward pass.

    Args:
      logits_fn: the LM head, a function of ``[B, t, D]``.
      hidden: its input, ``[B, T, D]``.
      targets: as in `cross_entropy`.
      mask: as in `cross_entropy`.

    Returns:
      ``[B, T]`` float32.

    Raises:
      TypeError: `targets` are not integers.
    """
    length = hidden.shape[1]
    size = jax.eval_shape(logits_fn, hidden).size
    parts = min(length, -(-size // MAX_LOGITS))
    if parts <= 1:
        return cross_entropy(logits_fn(hidden), targets, mask)
    each = -(-length // parts)

    def split(x: jax.Array | np.ndarray) -> jax.Array:
        padding = [(0, 0), (0, -length % each), *[(0, 0)] * (x.ndim - 2)]
        padded = jnp.pad(x, padding) if length % each else jnp.asarray(x)
        return padded.reshape(x.shape[0], -1, each, *x.shape[2:]).swapaxes(0, 1)

    @jax.checkpoint
    def chunk_cross_entropy(hidden: jax.Array, targets: jax.Array, mask: jax.Array) -> jax.Array:
        return cross_entropy(logits_fn(hidden), targets, mask)

    chunks = tuple(map(split, (hidden, targets, mask)))
    nll = jax.lax.map(lambda chunk: chunk_cross_entropy(*chunk), chunks)
    return nll.swapaxes(0, 1).reshape(hidden.shape[0], -1)[:, :length]
