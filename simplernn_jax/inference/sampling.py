"""Sampling of the next token from logits, as pure functions of float32 logits and keys.

Every setting is a traced value, so that changing it does not recompile.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key, UInt

NextLogits = Float[Array, "B vocab"]

IMPOSSIBLE = -1e30
"""Logit of an id that `keep_only` leaves out; its probability is 0."""
TOP_LOGPROBS = 20
"""Maximum number of alternatives that are reported for a token."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Settings of one sequence, checked."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = dataclasses.field(default_factory=dict)
    banned_ids: tuple[int, ...] = ()
    stop_ids: tuple[int, ...] = ()
    """Ids that end the sequence."""
    seed: int = 0

    def arrays(self, vocab_size: int) -> "Settings":
        """Return NumPy arrays without the axis B."""
        bias = np.zeros(vocab_size, np.float32)
        bias[list(self.logit_bias)] = list(self.logit_bias.values())
        bias[list(self.banned_ids)] = -np.inf
        is_stop = np.zeros(vocab_size, np.bool_)
        is_stop[list(self.stop_ids)] = True
        arrays: tuple[Any, ...] = (
            np.uint32(self.seed),
            np.float32(self.temperature),
            np.int32(self.top_k),
            np.float32(self.top_p),
            np.float32(self.min_p),
            bias,
            is_stop,
        )
        return Settings(*arrays)


class Settings(NamedTuple):
    """`Sampling` of B sequences as arrays; those that all share have 1 in place of B."""

    seed: UInt[Array, "B"]
    temperature: Float[Array, "B"]
    top_k: Int[Array, "B"]
    top_p: Float[Array, "B"]
    min_p: Float[Array, "B"]
    bias: Float[Array, "B vocab"]
    """Added to the logits; -inf bans an id."""
    is_stop: Bool[Array, "B vocab"]


class Penalties(NamedTuple):
    """Penalties of B sequences for tokens that they already have."""

    repetition: Float[Array, "B"]
    """Divides logits above 0 and multiplies others, of ids in the prompt or the new tokens."""
    presence: Float[Array, "B"]
    """Subtracted once for ids among the new tokens."""
    frequency: Float[Array, "B"]
    """Subtracted for each occurrence among the new tokens."""
    in_prompt: Bool[Array, "B vocab"]
    counts: Int[Array, "B vocab"]
    """Occurrences among the new tokens."""


class TokenLogprobs(NamedTuple):
    """Log-probabilities of tokens under the model, before bias, penalties and temperature."""

    token: Float[Array | np.ndarray, "... T"]
    top: Float[Array | np.ndarray, "... T top"]
    """The largest, in descending order."""
    top_ids: Int[Array | np.ndarray, "... T top"]


def next_token(
    logits: NextLogits,
    settings: Settings,
    penalties: Penalties | None,
    with_penalties: Bool[Array, ""],
    keys: Key[Array, "B"],
    position: Int[Array, "B"],
) -> Int[Array, "B"]:
    """Choose the next token of each sequence.

    Args:
      logits: of the model.
      settings: of the sequences.
      penalties: of the sequences; None if none has any.
      with_penalties: False if `penalties` are neutral: they are not computed.
      keys: of the random stream of each sequence.
      position: the number of its draw, which selects a key of the stream.
    """
    logits = logits + settings.bias
    if penalties is not None:
        logits = lax.cond(with_penalties, _penalized, lambda logits, _: logits, logits, penalties)

    def draw() -> Int[Array, "B"]:
        return sample(logits, jax.vmap(jax.random.fold_in)(keys, position), settings)

    # A branch that is not taken costs nothing: greedy decoding draws no random numbers.
    return lax.cond(jnp.any(settings.temperature > 0), draw, lambda: greedy(logits))


def _penalized(logits: NextLogits, penalties: Penalties) -> NextLogits:
    repetition, presence, frequency, in_prompt, counts = penalties
    factor = jnp.where(in_prompt | (counts > 0), repetition[:, None], 1.0)
    logits = jnp.where(logits > 0, logits / factor, logits * factor)
    logits -= jnp.where(counts > 0, presence[:, None], 0.0)
    return logits - frequency[:, None] * counts.astype(jnp.float32)


def sample(logits: NextLogits, keys: Key[Array, "B"], settings: Settings) -> Int[Array, "B"]:
    """Sample one token id per sequence.

    Args:
      logits: [B, vocab] float32; -inf masks an id.
      keys: one typed random key per sequence, the only one that its sample depends on.
      settings: without `Settings.bias`. ``temperature`` divides the logits; 0 is greedy and ignores
        everything else. ``min_p`` masks ids less probable than min_p times the most probable one;
        then ``top_k`` keeps the k most probable ids, and ``top_p`` the smallest set of most
        probable ids whose probabilities add up to it. 0, 0 and 1 turn them off.

    Returns:
      [B] int32 ids. Ties are broken by the lower id.
    """
    temperature, top_k, top_p, min_p = (
        jnp.reshape(setting, (-1, 1))
        for setting in (settings.temperature, settings.top_k, settings.top_p, settings.min_p)
    )

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


def keep_only(logits: NextLogits, ids: np.ndarray | None) -> Any:
    """Condition on one of `ids`, or on nothing if it is None; NumPy compiles nothing for it."""
    if ids is None:
        return logits
    kept = np.full(logits.shape, IMPOSSIBLE, np.float32)
    kept[:, ids] = np.asarray(logits)[:, ids]
    return kept


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
    # Rows alone: no bit depends on their number.
    probabilities = lax.map(jax.nn.softmax, jnp.where(in_top_k, ranked, -jnp.inf))
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    in_top_p = (before < top_p) | (jnp.asarray(top_p) >= 1)  # rounded sums may reach 1 too early
    is_kept = (in_top_k & in_top_p) | (rank == 0)
    sequences = jnp.arange(order.shape[0])[:, None]
    is_kept = jnp.zeros_like(is_kept).at[sequences, order].set(is_kept, unique_indices=True)
    return jnp.where(is_kept, logits, -jnp.inf)


def token_logprobs(logits: Float[Array, "T vocab"], tokens: Int[Array, "T"]) -> TokenLogprobs:
    """Compute the log-probabilities of `tokens` and of the most probable alternatives."""
    logprobs = lax.map(jax.nn.log_softmax, logits)  # rows alone: no bit depends on their number
    chosen = jnp.take_along_axis(logprobs, tokens[:, None], axis=1)[:, 0]
    top, top_ids = lax.top_k(logprobs, min(TOP_LOGPROBS, logits.shape[1]))
    return TokenLogprobs(chosen, top, top_ids)
