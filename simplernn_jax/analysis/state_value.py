"""Value of the recurrent state: the loss with the full context, and with less of it."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from absl import logging
from flax import nnx

from simplernn_jax.data.batches import Batch
from simplernn_jax.data.evaluation_batches import Contexts
from simplernn_jax.data.token_store import TokenSplit
from simplernn_jax.training.evaluate import Evaluation, Evaluator

LONG_TEXT = 16384
"""Tokens of a text that suffice to evaluate the state on it."""
SHORT_CONTEXT = 32
"""Tokens of the context that a full context is compared with."""

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

    `limit_tokens` is the number of predictions, 0 for all; `reset_every` tokens lie between two
    resets. `params` belong to the evaluator's model.

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

    The same predictions are scored each time. Arguments and errors are as in
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


def token_losses(
    evaluator: Evaluator, params: nnx.State, document: TokenSplit, windows: Contexts | None = None
) -> np.ndarray:
    """Return float64 [n - 1]: -log p of tokens 1 .. n - 1 of one document, given all before.

    With `windows`, given those alone.
    """
    total = document.num_predictions
    losses = np.zeros(0)
    for part in evaluator.scores(params, document, contexts=windows):
        losses = np.append(losses, np.asarray(part.nats, np.float64)[part.batch.loss_mask])
        logging.log_every_n_seconds(
            logging.INFO, "predicted %d of %d tokens", 10, len(losses), total
        )
    return losses


def short_context_losses(
    evaluator: Evaluator, params: nnx.State, ids: np.ndarray, count: int, context: int
) -> np.ndarray:
    """Return float64 [count]: -log p of the last of [n] `ids`, given `context` ids before each."""
    document = document_split(ids[len(ids) - count - context :], 0)
    return token_losses(evaluator, params, document, Contexts(context, 1))[context - 1 :]


class ContextGain(NamedTuple):
    """Mean reduction of a text's losses by more context, in nats per token."""

    predictions: int
    everything: float
    """Gain of the full context over one token of context."""
    far: float
    """Gain of the full context over `SHORT_CONTEXT` tokens."""


def context_gains(
    evaluator: Evaluator, params: nnx.State, ids: np.ndarray, losses: np.ndarray
) -> tuple[ContextGain | None, dict[int, float]]:
    """Measure by how much context lowers the losses of a text's last tokens.

    `losses` are -log p of tokens 1 .. n - 1 of `ids` [n], BOS included, given all before.

    Returns:
      The means (None if the text is too short) and, by position, the nats by which the tokens more
      than `SHORT_CONTEXT` before lower the loss.
    """
    count = min(_CANDIDATES, len(ids) - SHORT_CONTEXT - 1)
    if count < 1:
        return None, {}
    gains, single = (
        short_context_losses(evaluator, params, ids, count, context) - losses[-count:]
        for context in (SHORT_CONTEXT, 1)
    )
    means = ContextGain(count, float(np.mean(single)), float(np.mean(gains)))
    return means, dict(zip(range(len(ids) - count, len(ids)), gains.tolist(), strict=True))


def choose_token(gains: dict[int, float], num_tokens: int) -> tuple[int, str]:
    """Choose the token that gains most from distant context; return its position and the reason."""
    if not gains:
        return num_tokens - 1, f"it is the last one: none has more than {SHORT_CONTEXT} before it"
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
