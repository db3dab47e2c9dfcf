"""Batches of evaluation: every prediction of a split once, with state carried over documents."""

import heapq
from collections.abc import Iterator

import numpy as np

from simplernn_jax.data.batches import Batch, document_ends, gather
from simplernn_jax.data.token_store import TokenSplit
from simplernn_jax.errors import UserError, counted

_CHOICE_SEED = 20240229
"""Orders the documents of a limited evaluation, the same in every run."""

_LEAST_DOCUMENTS = 8
"""A limited evaluation spreads over at least so many documents, where there are as many."""


def evaluation_batches(
    split: TokenSplit,
    batch_tokens: int,
    max_rows: int,
    pad_id: int,
    limit_tokens: int = 0,
    reset_every: int = 0,
    divisible_by: tuple[int, int] = (1, 1),
) -> tuple[Iterator[Batch], int]:
    """Batches that score each prediction of `split` exactly once, in context.

    Whole documents are laid one after another in R rows, and the state goes from batch to batch:
    each prediction sees all of its document so far and nothing else, whatever R is. R is at most
    `max_rows`, and small enough that the longest document does not leave the other rows idle.

    Args:
      split: what to score.
      batch_tokens: most tokens of a batch, R T; at least T = 1 is taken.
      max_rows: most rows of a batch.
      pad_id: input and target where a row has ended (`loss_mask` False).
      limit_tokens: above 0, score only so many predictions: beginnings of documents in a fixed
        pseudo-random order, the same at every call.
      reset_every: above 0, clear the state after every so many tokens of a document. The batches
        hold the same predictions at the same places.
      divisible_by: what R and T are multiples of, at the cost of padding.

    Returns:
      The batches, all of one shape [R, T], and how many there are.

    Raises:
      UserError: the split holds nothing to predict.
    """
    starts, counts = scored_documents(split, limit_tokens)
    num_rows = int(max(1, min(max_rows, len(counts), counts.sum() // counts.max())))
    num_rows = round_up(num_rows, divisible_by[0])
    row_of, loads = _assign(counts, num_rows)
    by_row = np.argsort(row_of, kind="stable")
    length = min(max(1, batch_tokens // num_rows), int(loads.max()))
    length = round_up(length, divisible_by[1])
    num_batches = -(-int(loads.max()) // length)
    batches = _lay_out(
        split, starts[by_row], counts[by_row], loads, (length, num_batches), pad_id, reset_every
    )
    return batches, num_batches


def scored_documents(split: TokenSplit, limit_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Starts of the documents to score, and how many predictions of each.

    Args:
      split: what to score.
      limit_tokens: above 0, so many predictions: beginnings of documents in a fixed pseudo-random
        order, the same at every call.

    Raises:
      UserError: the split holds nothing to predict.
    """
    starts = np.asarray(split.document_starts)
    counts = document_ends(split) - starts - 1
    if limit_tokens and limit_tokens < counts.sum():
        chosen, counts = _choose(counts, limit_tokens)
        starts = starts[chosen]
    starts, counts = starts[counts > 0], counts[counts > 0]
    if not len(counts):
        raise UserError(
            f"nothing to score: the {split.name} split has {counted(len(split.tokens), 'token')} "
            "and none of them follows another in its document; give more text or a larger "
            "--config.data.validation_fraction"
        )
    return starts, counts


def round_up(number: int, divisor: int) -> int:
    """The smallest multiple of `divisor` that is at least `number`."""
    return -(-number // divisor) * divisor


def _choose(counts: np.ndarray, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Documents to score and how many predictions of each; they add up to `limit`."""
    random = np.random.Generator(np.random.Philox(np.random.SeedSequence(_CHOICE_SEED)))
    order = random.permutation(len(counts))
    most = -(-limit // _LEAST_DOCUMENTS)
    while np.minimum(counts, most).sum() < limit:
        most *= 2
    taken = np.minimum(counts[order], most)
    until = np.cumsum(taken)
    taken = np.clip(limit - (until - taken), 0, taken)
    return order, taken


def _assign(counts: np.ndarray, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Longest document first, each to the row with the least so far.

    Returns:
      The row of each document, and int64 [num_rows]: predictions in each row.
    """
    row_of = np.zeros(len(counts), np.int64)
    rows = [(0, row) for row in range(num_rows)]
    for document in np.argsort(-counts, kind="stable"):
        load, row = rows[0]
        row_of[document] = row
        heapq.heapreplace(rows, (load + int(counts[document]), row))
    loads = np.zeros(num_rows, np.int64)
    for load, row in rows:
        loads[row] = load
    return row_of, loads


def _lay_out(
    split: TokenSplit,
    starts: np.ndarray,
    counts: np.ndarray,
    loads: np.ndarray,
    shape: tuple[int, int],
    pad_id: int,
    reset_every: int,
) -> Iterator[Batch]:
    """Yields the batches of documents given in the order of the rows that hold them.

    All predictions lie on one line, document after document and row after row. An EOS predicts
    nothing and has no place on it.
    """
    length, num_batches = shape
    tokens = np.asarray(split.tokens)
    document_from = np.cumsum(counts) - counts
    row_from = np.cumsum(loads) - loads
    for step in range(num_batches):
        along = np.arange(step * length, (step + 1) * length)
        is_real = along < loads[:, None]
        line = np.where(is_real, row_from[:, None] + along, 0)
        document = np.searchsorted(document_from, line, side="right") - 1
        within = line - document_from[document]
        inputs, targets = gather(tokens, starts[document] + within, is_real, pad_id)
        segments = document
        if reset_every:
            within = within % reset_every
            segments = line - within
        yield Batch(
            tokens=inputs,
            targets=targets,
            loss_mask=is_real,
            segment_ids=np.where(is_real, segments, counts.sum()).astype(np.int32),
            reset=(within[:, 0] == 0) | (step == 0),
        )
