"""Choosing the next token from logits, as pure functions of float32 logits and keys.

Every setting may be a traced value, so that changing it does not recompile.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

NextLogits = Float[Array, "B vocab"]


def sample(
    logits: NextLogits,
    keys: Key[Array, "B"],
    *,
    temperature: Float[Array, ""] | float = 1.0,
    top_k: Int[Array, ""] | int = 0,
    top_p: Float[Array, ""] | float = 1.0,
) -> Int[Array, "B"]:
    """Draws one token id per row.

    Args:
      logits: [B, vocab] float32; -inf forbids an id.
      keys: one typed random key per row; a row's draw depends on its own key alone.
      temperature: divides the logits; 0 takes the best id and ignores everything else.
      top_k: only the k best ids can be drawn; 0 does not restrict.
      top_p: only the best ids that together reach this probability can be drawn, at least
        one; it counts after temperature and top_k. 1 does not restrict.

    Returns:
      [B] int32 ids. Of equal logits the lower id is the better one.
    """

    def draw() -> Int[Array, "B"]:
        # The best logit becomes 0 before the division, so that no temperature overflows it.
        relative = logits - jnp.max(logits, axis=-1, keepdims=True)
        divisor = jnp.clip(temperature, 1e-37, 1e37)  # its reciprocal is a normal float32 too
        scaled = jnp.where(logits == -jnp.inf, -jnp.inf, relative / divisor)
        is_restricted = (jnp.asarray(top_k) > 0) | (jnp.asarray(top_p) < 1)
        kept = lax.cond(is_restricted, keep_best, lambda scaled, *_: scaled, scaled, top_k, top_p)
        noise = jax.vmap(lambda key: jax.random.gumbel(key, kept.shape[1:]))(keys)
        return greedy(kept + noise)  # the Gumbel-max trick: a draw from softmax(kept)

    # A branch that is not taken costs nothing: greedy decoding draws no random numbers.
    return lax.cond(jnp.asarray(temperature) > 0, draw, lambda: greedy(logits))


def greedy(logits: NextLogits) -> Int[Array, "B"]:
    """The [B] int32 ids of the best logits; the lowest of equal ones."""
    # As jnp.argmax, whose reduction over pairs takes ten times as long on CPUs.
    last = logits.shape[-1] - 1
    is_best = logits >= jnp.max(logits, axis=-1, keepdims=True)
    ids = jnp.where(is_best, jnp.arange(last + 1)[None], last)
    return jnp.min(ids, axis=-1).astype(jnp.int32)


def keep_best(
    logits: NextLogits, top_k: Int[Array, ""] | int, top_p: Float[Array, ""] | float
) -> NextLogits:
    """Sets the logits of all ids outside `top_k` and `top_p` (see `sample`) to -inf."""
    # All of them, best first, of equal ones the lower id first.
    ranked, order = lax.top_k(logits, logits.shape[-1])
    rank = jnp.arange(logits.shape[-1])[None]
    in_top_k = (rank < top_k) | (jnp.asarray(top_k) <= 0)
    probabilities = jax.nn.softmax(jnp.where(in_top_k, ranked, -jnp.inf), axis=-1)
    better = jnp.cumsum(probabilities, axis=-1) - probabilities
    in_top_p = (better < top_p) | (jnp.asarray(top_p) >= 1)  # rounded sums may reach 1 too early
    kept = (in_top_k & in_top_p) | (rank == 0)
    return jnp.where(_unsort(kept, order), logits, -jnp.inf)


def _unsort(values: Bool[Array, "B vocab"], order: Int[Array, "B vocab"]) -> Bool[Array, "B vocab"]:
    rows = jnp.arange(order.shape[0])[:, None]
    return jnp.zeros_like(values).at[rows, order].set(values, unique_indices=True)
