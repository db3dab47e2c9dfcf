"""Sampling of the next token from logits, as pure functions of float32 logits and keys.

Every setting may be a traced value, so that changing it does not recompile.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

NextLogits = Float[Array, "B vocab"]


class Settings(NamedTuple):
    """Settings of `generate` as arrays."""

    key: Key[Array, ""]
    temperature: Float[Array, ""]
    top_k: Int[Array, ""]
    top_p: Float[Array, ""]
    eos_id: Int[Array, ""]
    """-1: no token ends a sequence."""
    is_banned: Bool[Array, "vocab"]


def sample(
    logits: NextLogits,
    keys: Key[Array, "B"],
    *,
    temperature: Float[Array, "*B"] | float = 1.0,
    top_k: Int[Array, "*B"] | int = 0,
    top_p: Float[Array, "*B"] | float = 1.0,
    min_p: Float[Array, "*B"] | float = 0.0,
) -> Int[Array, "B"]:
    """Sample one token id per sequence.

    Each setting is one for all sequences, or [B], one for each.

    Args:
      logits: [B, vocab] float32; -inf masks an id.
      keys: one typed random key per sequence, the only one that its sample depends on.
      temperature: divides the logits; 0 is greedy and ignores everything else.
      top_k: sample among the k most probable ids; 0 is off.
      top_p: nucleus sampling, after temperature and top_k: sample among the smallest set of most
        probable ids whose probabilities add up to top_p; 1 is off.
      min_p: mask ids less probable than min_p times the most probable one, before top_k; 0 is off.

    Returns:
      [B] int32 ids. Ties are broken by the lower id.
    """

    temperature, top_k, top_p, min_p = (
        jnp.reshape(setting, (-1, 1)) for setting in (temperature, top_k, top_p, min_p)
    )

    def draw() -> Int[Array, "B"]:
        # The largest logit becomes 0 before the division, so that no temperature overflows it.
        relative = logits - jnp.max(logits, axis=-1, keepdims=True)
        divisor = jnp.clip(temperature, 1e-37, 1e37)  # its reciprocal is a normal float32 too
        is_masked = (logits == -jnp.inf) | (relative / divisor < jnp.log(min_p))
        scaled = jnp.where(is_masked, -jnp.inf, relative / divisor)
        is_restricted = jnp.any((top_k > 0) | (top_p < 1))
        kept = lax.cond(is_restricted, mask_logits, lambda scaled, *_: scaled, scaled, top_k, top_p)
        noise = jax.vmap(lambda key: jax.random.gumbel(key, kept.shape[1:]))(keys)
        drawn = greedy(kept + noise)  # the Gumbel-max trick: a sample from softmax(kept)
        return jnp.where(temperature[:, 0] > 0, drawn, greedy(logits))

    # A branch that is not taken costs nothing: greedy decoding draws no random numbers.
    return lax.cond(jnp.any(temperature > 0), draw, lambda: greedy(logits))


def greedy(logits: NextLogits) -> Int[Array, "B"]:
    """Return the [B] int32 ids of the largest logits; the lowest of equal ones."""
    # As jnp.argmax, whose reduction over pairs takes ten times as long on CPUs.
    last = logits.shape[-1] - 1
    is_best = logits >= jnp.max(logits, axis=-1, keepdims=True)
    ids = jnp.where(is_best, jnp.arange(last + 1)[None], last)
    return jnp.min(ids, axis=-1).astype(jnp.int32)


def mask_logits(
    logits: NextLogits, top_k: Int[Array, "..."] | int, top_p: Float[Array, "..."] | float
) -> NextLogits:
    """Set the logits of all ids outside `top_k` and `top_p` (see `sample`) to -inf.

    Each setting is one number, or [B, 1].
    """
    # Sorted in descending order, of equal ones the lower id first.
    ranked, order = lax.top_k(logits, logits.shape[-1])
    rank = jnp.arange(logits.shape[-1])[None]
    in_top_k = (rank < top_k) | (jnp.asarray(top_k) <= 0)
    probabilities = jax.nn.softmax(jnp.where(in_top_k, ranked, -jnp.inf), axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    in_top_p = (before < top_p) | (jnp.asarray(top_p) >= 1)  # rounded sums may reach 1 too early
    is_kept = (in_top_k & in_top_p) | (rank == 0)
    sequences = jnp.arange(order.shape[0])[:, None]
    is_kept = jnp.zeros_like(is_kept).at[sequences, order].set(is_kept, unique_indices=True)
    return jnp.where(is_kept, logits, -jnp.inf)
