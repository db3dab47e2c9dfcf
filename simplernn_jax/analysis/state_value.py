"""What the recurrent state is worth: the loss with all of the past, and with less of it."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from simplernn_jax.analysis.progress import Report, begin_stage, no_report
from simplernn_jax.data.batches import Batch
from simplernn_jax.data.token_store import TokenSplit
from simplernn_jax.models import LanguageModel
from simplernn_jax.training.evaluate import Evaluation, Evaluator

LONG_TEXT = 16384
"""Tokens from which on a text is enough to evaluate the state on."""

_ROWS_TOKENS = 8192
"""Tokens of one call when every prediction reads a window of its own."""


class PositionLoss(NamedTuple):
    """Mean loss by how much of the document stands before; bins [1, 2), [2, 4), [4, 8) ..."""

    starts: np.ndarray
    """int [bins], the smallest number of tokens read, BOS included, of each bin."""
    counts: np.ndarray
    """int [bins], predictions; none is 0."""
    carried: np.ndarray
    """float64 [bins], nats per token with the state carried over the whole document."""
    reset: np.ndarray
    """float64 [bins], with the state cleared every so many tokens."""
    errors: np.ndarray
    """float64 [bins], standard error of `carried`, as if predictions were independent."""
    reset_errors: np.ndarray
    """float64 [bins], the same of `reset`."""


def loss_by_position(
    evaluator: Evaluator, params: nnx.State, split: TokenSplit, limit_tokens: int, reset_every: int
) -> PositionLoss:
    """Scores the same predictions with the state carried and with it cleared, by position.

    Args:
      evaluator: of the model's structure.
      params: its parameters.
      split: what to score.
      limit_tokens: predictions; 0 scores all.
      reset_every: tokens between two resets, for comparison.

    Raises:
      UserError: the split holds nothing to predict.
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
        for row, weights in enumerate(
            (np.ones_like(nats), nats, nats**2, reset_nats, reset_nats**2)
        ):
            totals[row] += np.bincount(bins, weights, minlength=64)
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
    report: Report = no_report,
) -> dict[int, Evaluation]:
    """The loss for every interval of resets, in tokens; 0 carries the state.

    The same predictions are scored each time. Arguments and errors as in `loss_by_position`.
    """
    different = dict.fromkeys(intervals)
    advance = begin_stage(report, "measuring the loss with resets", len(different))
    losses = {}
    for interval in different:
        losses[interval] = evaluator(params, split, limit_tokens, interval)
        advance(len(losses))
    return losses


def document_split(tokens: np.ndarray, num_bytes: int) -> TokenSplit:
    """One document of [n] ids, BOS included, of `num_bytes` bytes of text."""
    return TokenSplit("text", np.asarray(tokens), np.zeros(1, np.int64), num_bytes, "")


def choose_split(document: TokenSplit, validation: TokenSplit | None) -> tuple[TokenSplit, str]:
    """What to evaluate the state on, and a name for it.

    `document`, the given text, if it has `LONG_TEXT` tokens or more than `validation`, the
    held-out text of the run; otherwise `validation`.
    """
    enough = len(document.tokens) >= LONG_TEXT
    if validation is None or enough or validation.num_predictions <= document.num_predictions:
        return document, "the given text"
    documents = len(validation.document_starts)
    return validation, f"the validation split of the run (documents: {documents:,})"


def token_losses(
    evaluator: Evaluator, params: nnx.State, document: TokenSplit, report: Report = no_report
) -> np.ndarray:
    """float64 [n - 1]: -log p of tokens 1 .. n - 1 of one document, given all before them."""
    advance = begin_stage(report, "predicting every token of the text", document.num_predictions)
    losses = np.zeros(0)
    for part in evaluator.scores(params, document):
        losses = np.append(losses, np.asarray(part.nats, np.float64)[part.batch.loss_mask])
        advance(len(losses))
    return losses


def short_context_losses(
    model: LanguageModel, tokens: np.ndarray, chosen: np.ndarray, context: int
) -> np.ndarray:
    """float64 [m]: -log p of the tokens at `chosen` given only the `context` tokens before them.

    Args:
      model: the language model.
      tokens: [n] ids.
      chosen: [m] positions, all at least `context`.
      context: tokens read from a zero state before each prediction.
    """
    graph, params = nnx.split(model)

    @jax.jit
    def score(params: nnx.State, windows: jax.Array, targets: jax.Array) -> jax.Array:
        model = nnx.merge(graph, params)
        hidden, _ = model.encode(windows)
        logs = jax.nn.log_softmax(model.logits(hidden[:, -1]))
        return -jnp.take_along_axis(logs, targets[:, None], axis=1)[:, 0]

    rows = max(1, min(_ROWS_TOKENS // context, len(chosen)))
    tokens, chosen = np.asarray(tokens, np.int32), np.asarray(chosen, np.int64)
    nats = []
    for start in range(0, len(chosen), rows):
        # The last group is filled with its first row, so that one program serves all.
        group = np.resize(chosen[start : start + rows], rows)
        windows = tokens[group[:, None] + np.arange(-context, 0)]
        nats.append(np.asarray(score(params, windows, tokens[group]), np.float64))
    return np.concatenate(nats)[: len(chosen)] if nats else np.zeros(0)


def reset_intervals(longest: int, window: int) -> list[int]:
    """Powers of four below `longest` tokens, the training window, and 0 for never."""
    powers = [4**n for n in range(1, max(2, math.ceil(math.log(max(longest, 2), 4))))]
    return [0, *sorted({*powers, window})]


def _positions(batch: Batch, before: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """``[R, T]``: tokens of the same document before each input, and those before the next batch.

    Args:
      batch: of an evaluation whose state is carried.
      before: [R], as returned for the batch before; None for the first.
    """
    ids = batch.segment_ids
    begins = np.concatenate([batch.reset[:, None], ids[:, 1:] != ids[:, :-1]], axis=1)
    columns = np.arange(ids.shape[1])
    start = np.maximum.accumulate(np.where(begins, columns, -1), axis=1)
    carried = np.zeros(len(ids), np.int64) if before is None else before
    positions = np.where(start >= 0, columns - start, carried[:, None] + columns)
    return positions, positions[:, -1] + 1
