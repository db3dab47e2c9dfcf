"""What the predictions of a text gain from the tokens before them, and which one gains most."""

from typing import NamedTuple

import numpy as np

from simplernn_jax.analysis.state_value import short_context_losses
from simplernn_jax.models import LanguageModel

SHORT_CONTEXT = 32
"""Tokens; what a prediction gains from all of the past is measured against these alone."""

_CANDIDATES = 1024
"""The chosen token is looked for among so many at the end of the text."""


class ContextGain(NamedTuple):
    """What predictions of one text gain from more context, in nats per token."""

    predictions: int
    everything: float
    """The mean loss with one token of context, less that with all before."""
    far: float
    """The mean loss with only `SHORT_CONTEXT` tokens of context, less that with all before."""


def context_gains(
    model: LanguageModel, ids: np.ndarray, losses: np.ndarray
) -> tuple[ContextGain | None, dict[int, float]]:
    """What the last tokens of a text gain from context: together, and each from the far past.

    Args:
      model: the language model.
      ids: [n] tokens, BOS included.
      losses: [n - 1], -log p of tokens 1 .. n - 1 given all before them.

    Returns:
      The means (None without such a token) and, by position, the nats that what stands more than
      `SHORT_CONTEXT` tokens before a token takes off its loss.
    """
    candidates = np.arange(max(SHORT_CONTEXT + 1, len(ids) - _CANDIDATES), len(ids))
    if not len(candidates):
        return None, {}
    full = losses[candidates - 1]
    gains = short_context_losses(model, ids, candidates, SHORT_CONTEXT) - full
    single = short_context_losses(model, ids, candidates, 1) - full
    means = ContextGain(len(candidates), float(np.mean(single)), float(np.mean(gains)))
    return means, dict(zip(candidates.tolist(), gains.tolist(), strict=True))


def choose_token(gains: dict[int, float], num_tokens: int) -> tuple[int, str]:
    """The token that gains most from the far past, and a sentence that says so.

    Args:
      gains: of the candidates, as `context_gains` returns them.
      num_tokens: of the text, BOS included.
    """
    if not gains:
        reason = f"the last one: no other stands after more than {SHORT_CONTEXT} tokens"
        return num_tokens - 1, reason
    best = max(gains, key=lambda token: gains[token])
    return best, (
        f"what stands more than {SHORT_CONTEXT} tokens before it lowers its loss by "
        f"{gains[best]:.2f} nats, more than that of any other"
    )
