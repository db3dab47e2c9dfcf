"""The loss of a language model, as a sum and a count so that any grouping gives the same mean."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from simplernn_jax.array_types import Logits, LossMask, Tokens
from simplernn_jax.parallel import vocabulary
from simplernn_jax.parallel.collectives import axis_size


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
    if axis_size("tensor") > 1:
        nats = vocabulary.cross_entropy(logits, jnp.asarray(targets))
    else:
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return jnp.where(mask, nats, 0.0)


def summed_cross_entropy(
    logits: Logits, targets: Tokens | np.ndarray, mask: LossMask | np.ndarray
) -> jax.Array:
    """Sum over all positions of `cross_entropy`, with its arguments."""
    return jnp.sum(cross_entropy(logits, targets, mask))
