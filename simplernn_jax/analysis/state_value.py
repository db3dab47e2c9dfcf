"""Value of the recurrent state: the loss with the full context, and with less of it."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx

from simplernn_jax.data.batches import Batch
from simplernn_jax.data.token_store import TokenSplit
from simplernn_jax.models import LanguageModel
from simplernn_jax.training.evaluate import Evaluation, Evaluator

LONG_TEXT = 16384
"""Tokens of a text that suffice to evaluate the state on it."""
SHORT_CONTEXT = 32
"""Tokens of the context that a full context is compared with."""

_BATCH_TOKENS = 8192
"""Tokens of one call when every prediction has a context of its own."""
_CANDIDATES = 1024
"""Number of tokens at the end of the text among which one is chosen."""


class PositionLoss(NamedTuple):
    """Mean loss by the number of tokens before in the document, in bins [1, 2), [2, 4) ..."""

    starts: np.ndarray
    """int [bins], lower bounds: tokens before the prediction, BOS included."""
    counts: np.ndarray
    """int [bins], predictions, at least 1."""
    carried: np.ndarray
    """float64 [bins], nats per token with the state carried across the whole document."""
    reset: np.ndarray
    """float64 [bins], with the state reset at a fixed interval."""
    errors: np.ndarray
    """float64 [bins], standard error of `carried`, as if predictions were independent."""
    reset_errors: np.ndarray
    """float64 [bins], standard error of `reset`."""


def loss_by_position(
    evaluator: Evaluator, params: nnx.State, split: TokenSplit, limit_tokens: int, reset_every: int
) -> PositionLoss:
    """Score the same predictions with the state carried and with it reset, by position.

    `limit_tokens` is the number of predictions; 0 scores all.

    Raises:
      UserError: the split has nothing to predict.
    """
    totals = np.zeros((5, 64))  # count, carried, its square, reset, its square; positions < 2**64
    before: np.ndarray | None = None
    pairs = zip(
        evaluator.scores(params, split, limit_tokens),
        evaluator.scores(params, split, limit_tokens, reset_every),
        strict=True,
    )
    for carried, reset in pairs:
        positions, before = _positions(carried.batch, before)
        is_real = carried.batch.loss_mask
        bins = np.log2(positions[is_real] + 1).astype(np.int64)
        nats, reset_nats = (np.asarray(x.nats, np.float64)[is_real] for x in (carried, reset))
        for index, weights in enumerate(
            (np.ones_like(nats), nats, nats**2, reset_nats, reset_nats**2)
        ):
            totals[index] += np.bincount(bins, weights, minlength=64)
    used = np.flatnonzero(totals[0])
    counts, carried_sum, squares, reset_sum, reset_squares = totals[:, used]
    return PositionLoss(
        2**used,
        counts.astype(np.int64),
        carried_sum / counts,
        reset_sum / counts,
        _standard_error(counts, carried_sum, squares),
        _standard_error(counts, reset_sum, reset_squares),
    )


def _standard_error(counts: np.ndarray, sums: np.ndarray, squares: np.ndarray) -> np.ndarray:
    spread = np.maximum(squares / counts - (sums / counts) ** 2, 0)
    return np.sqrt(spread / np.maximum(counts - 1, 1))


def loss_by_reset(
    evaluator: Evaluator,
    params: nnx.State,
    split: TokenSplit,
    limit_tokens: int,
    intervals: Sequence[int],
) -> dict[int, Evaluation]:
    """Return the loss for every reset interval in tokens; 0 carries the state.

    The same predictions are scored each time. Arguments and errors are those of
    `loss_by_position`.
    """
    different = dict.fromkeys(intervals)
    logging.info("measuring the loss at %d reset intervals ...", len(different))
    losses = {}
    for interval in different:
        losses[interval] = evaluator(params, split, limit_tokens, interval)
        logging.log_every_n_seconds(
            logging.INFO, "measured %d of %d reset intervals", 10, len(losses), len(different)
        )
    return losses


def document_split(tokens: np.ndarray, num_bytes: int) -> TokenSplit:
    """Create a split of one document: [n] ids, BOS included, and the bytes of its text."""
    return TokenSplit("text", np.asarray(tokens), np.zeros(1, np.int64), num_bytes, "")


def choose_split(document: TokenSplit, validation: TokenSplit | None) -> tuple[TokenSplit, str]:
    """Return the split to evaluate the state on, and its name.

    `document`, the given text, if it has `LONG_TEXT` tokens or at least as many as `validation`,
    the held-out text of the run; otherwise `validation`.
    """
    enough = len(document.tokens) >= LONG_TEXT
    if validation is None or enough or validation.num_predictions <= document.num_predictions:
        return document, "the given text"
    documents = len(validation.document_starts)
    return validation, f"the validation split of the run (documents: {documents:,})"


def token_losses(evaluator: Evaluator, params: nnx.State, document: TokenSplit) -> np.ndarray:
    """Return float64 [n - 1]: -log p of tokens 1 .. n - 1 of one document, given all before."""
    total = document.num_predictions
    logging.info("predicting every token of the text ...")
    losses = np.zeros(0)
    for part in evaluator.scores(params, document):
        losses = np.append(losses, np.asarray(part.nats, np.float64)[part.batch.loss_mask])
        logging.log_every_n_seconds(
            logging.INFO, "predicted %d of %d tokens", 10, len(losses), total
        )
    return losses


def short_context_losses(
    model: LanguageModel, tokens: np.ndarray, chosen: np.ndarray, context: int
) -> np.ndarray:
    """Return float64 [m]: -log p of the tokens at `chosen` given `context` tokens before each.

    Args:
      model: the language model.
      tokens: [n] ids.
      chosen: [m] positions, all at least `context`.
      context: tokens before each prediction, read from a zero state.
    """
    graph, params = nnx.split(model)

    @jax.jit
    def score(params: nnx.State, windows: jax.Array, targets: jax.Array) -> jax.Array:
        model = nnx.merge(graph, params)
        hidden, _ = model.hidden_states(windows)
        logs = jax.nn.log_softmax(model.logits(hidden[:, -1]))
        return -jnp.take_along_axis(logs, targets[:, None], axis=1)[:, 0]

    batch_size = max(1, min(_BATCH_TOKENS // context, len(chosen)))
    tokens, chosen = np.asarray(tokens, np.int32), np.asarray(chosen, np.int64)
    nats = []
    for start in range(0, len(chosen), batch_size):
        # The last batch repeats its tokens, so that all batches share one compiled program.
        group = np.resize(chosen[start : start + batch_size], batch_size)
        windows = tokens[group[:, None] + np.arange(-context, 0)]
        nats.append(np.asarray(score(params, windows, tokens[group]), np.float64))
    return np.concatenate(nats)[: len(chosen)] if nats else np.zeros(0)


class ContextGain(NamedTuple):
    """Mean reduction of a text's losses by more context, in nats per token."""

    predictions: int
    everything: float
    """Gain of the full context over one token of context."""
    far: float
    """Gain of the full context over `SHORT_CONTEXT` tokens."""


def context_gains(
    model: LanguageModel, ids: np.ndarray, losses: np.ndarray
) -> tuple[ContextGain | None, dict[int, float]]:
    """Measure by how much context lowers the losses of a text's last tokens.

    Args:
      model: the language model.
      ids: [n] tokens, BOS included.
      losses: [n - 1], -log p of tokens 1 .. n - 1 given all before.

    Returns:
      The means (None if the text is too short) and, by position, the nats by which the tokens more
      than `SHORT_CONTEXT` before lower the loss.
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
    """Choose the token that gains most from distant context; return its position and the reason."""
    if not gains:
        return num_tokens - 1, f"the last one: no token has more than {SHORT_CONTEXT} before it"
    best = max(gains, key=lambda token: gains[token])
    return best, (
        f"the text more than {SHORT_CONTEXT} tokens before it lowers its loss by "
        f"{gains[best]:.2f} nats, more than for any other token"
    )


def reset_intervals(longest: int, window: int) -> list[int]:
    """Return powers of four below `longest` tokens, the training window, and 0 for never."""
    powers = [4**n for n in range(1, max(2, math.ceil(math.log(max(longest, 2), 4))))]
    return [0, *sorted({*powers, window})]


def _positions(batch: Batch, before: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Return ``[B, T]``, tokens of the document before each input, and [B] for the next batch."""
    ids = batch.segment_ids
    begins = np.concatenate([batch.reset[:, None], ids[:, 1:] != ids[:, :-1]], axis=1)
    columns = np.arange(ids.shape[1])
    start = np.maximum.accumulate(np.where(begins, columns, -1), axis=1)
    carried = np.zeros(len(ids), np.int64) if before is None else before
    positions = np.where(start >= 0, columns - start, carried[:, None] + columns)
    return positions, positions[:, -1] + 1
