"""Batches of evaluation: each prediction of a split once, with a carried state or in contexts."""

import heapq
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from simplernn_jax.data.batches import Batch, document_ends, gather, round_up
from simplernn_jax.data.token_split import ShardedArray
from simplernn_jax.data.token_store import TokenSplit
from simplernn_jax.errors import UserError, counted

_ORDER_SEED = 20240229
"""Seed of the order of documents in a limited evaluation, the same in every run."""

_MIN_DOCUMENTS = 8
"""Documents that a limited evaluation covers at least, if there are as many."""


class Contexts(NamedTuple):
    """Overlapping contexts, each from a zero state, for a model without a carried state.

    A context begins every `stride` tokens of a document. The first one scores all its predictions,
    each other one only its last `stride`, which no earlier context scores and which see at least
    ``length - stride + 1`` tokens, or all that precede them in the document.
    """

    length: int
    """Tokens of a context."""
    stride: int
    """Tokens between the starts of consecutive contexts, in [1, length]; `length` resets the state
    every `length` tokens."""


def check_contexts(contexts: Contexts) -> None:
    """Raise `UserError` for contexts that do not advance, or leave tokens out."""
    length, stride = contexts
    if not 1 <= stride <= length:
        raise UserError(
            f"contexts of {length} tokens, one every {stride}: the stride must be at least 1 and "
            "at most the length, or tokens would be left out"
        )


def evaluation_batches(
    split: TokenSplit,
    batch_tokens: int,
    max_batch_size: int,
    pad_id: int,
    limit_tokens: int = 0,
    reset_every: int = 0,
    divisible_by: tuple[int, int] = (1, 1),
) -> tuple[Iterator[Batch], int]:
    """Lay out whole documents so that each prediction of `split` is scored once, in full context.

    Documents are concatenated in B sequences whose state is carried from batch to batch: each
    prediction sees all of its document so far and nothing else, whatever B is. B is at most
    `max_batch_size`, and small enough that the longest document does not leave sequences idle.

    Args:
      split: documents to score.
      batch_tokens: B T at most; at least T = 1 is taken.
      max_batch_size: B at most.
      pad_id: input and target after the end of a sequence (`loss_mask` False).
      limit_tokens: above 0, the number of targets to score: those that come first in documents in a
        fixed pseudo-random order, the same at every call.
      reset_every: above 0, tokens of a document after which the state is reset. The batches hold
        the same predictions at the same places.
      divisible_by: divisors of B and T, at the cost of padding.

    Returns:
      The batches, all of one shape [B, T], and their number.

    Raises:
      UserError: the split has no prediction.
    """
    starts, counts = _scored_documents(split, limit_tokens)
    batch_size = int(max(1, min(max_batch_size, len(counts), counts.sum() // counts.max())))
    batch_size = round_up(batch_size, divisible_by[0])
    sequence_of, loads = _assign(counts, batch_size)
    order = np.argsort(sequence_of, kind="stable")
    longest = int(loads.max())
    length = round_up(min(max(1, batch_tokens // batch_size), longest), divisible_by[1])
    shape = length, -(-longest // length)
    batches = _lay_out(split, starts[order], counts[order], loads, shape, pad_id, reset_every)
    return batches, shape[1]


def context_batches(
    split: TokenSplit,
    contexts: Contexts,
    batch_tokens: int,
    max_batch_size: int,
    pad_id: int,
    limit_tokens: int = 0,
    divisible_by: tuple[int, int] = (1, 1),
) -> tuple[Iterator[Batch], int]:
    """Lay out overlapping contexts that score each prediction of `split` once.

    Args and returns are the same as of `evaluation_batches`, which scores the same predictions;
    at least one context is in a batch.

    Raises:
      UserError: the split has no prediction, or no such contexts are possible.
    """
    check_contexts(contexts)
    length, stride = contexts
    starts, counts = _scored_documents(split, limit_tokens)
    per_document = 1 + np.maximum(0, -(-(counts - length) // stride))
    document = np.repeat(np.arange(len(counts)), per_document)
    nth = np.arange(len(document)) - np.repeat(np.cumsum(per_document) - per_document, per_document)
    begins = starts[document] + nth * stride
    lengths = np.minimum(length, counts[document] - nth * stride)
    skips = np.where(nth == 0, 0, length - stride)
    longest = round_up(int(lengths.max()), divisible_by[1])
    batch_size = max(1, min(max_batch_size, batch_tokens // longest, len(document)))
    batch_size = round_up(batch_size, divisible_by[0])
    number = -(-len(document) // batch_size)

    def lay_out() -> Iterator[Batch]:
        along = np.arange(longest)
        padding = np.zeros(number * batch_size - len(document), np.int64)
        table = np.stack([np.append(column, padding) for column in (begins, lengths, skips)])
        for begin, count, skip in table.reshape(3, number, batch_size, 1).swapaxes(0, 1):
            batch = gather(split, begin + along, along < count, pad_id)
            yield batch._replace(loss_mask=batch.loss_mask & (along >= skip))

    return lay_out(), number


def _scored_documents(split: TokenSplit, limit_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Choose the documents to score; return their starts and numbers of predictions."""
    check_scorable(split)
    starts = np.asarray(split.document_starts)
    counts = document_ends(split) - starts - 1
    if limit_tokens and limit_tokens < split.num_predictions:
        targets = split.targets
        numbers = counts if targets is None else _count_targets(targets, starts, counts)
        order, numbers = _choose(numbers, min(limit_tokens, int(numbers.sum())))
        starts, counts = starts[order], counts[order]
        counts = numbers if targets is None else _tokens_until(targets, starts, counts, numbers)
    return starts[counts > 0], counts[counts > 0]


def check_scorable(split: TokenSplit) -> None:
    """Raise `UserError` if a split has nothing to predict."""
    if not split.num_predictions:
        what = "follows another in its document" if split.targets is None else "is the assistant's"
        raise UserError(
            f"nothing to score: the {split.name} split has {counted(len(split.tokens), 'token')} "
            f"and none of them {what}; use more text or a larger "
            "config.data.validation_fraction"
        )


def _count_targets(
    targets: np.ndarray | ShardedArray, starts: np.ndarray, counts: np.ndarray
) -> np.ndarray:
    """Return how many of the `counts` tokens after each of the `starts` are targets."""
    spans = zip((starts + 1).tolist(), counts.tolist(), strict=True)
    return np.array([np.count_nonzero(targets[at : at + count]) for at, count in spans], np.int64)


def _tokens_until(
    targets: np.ndarray | ShardedArray, starts: np.ndarray, counts: np.ndarray, taken: np.ndarray
) -> np.ndarray:
    """Return how many tokens after each of the `starts` hold its first `taken` targets."""
    lengths = np.zeros_like(taken)
    for n in np.flatnonzero(taken):
        at = int(starts[n]) + 1
        lengths[n] = np.flatnonzero(targets[at : at + int(counts[n])])[taken[n] - 1] + 1
    return lengths


def _choose(counts: np.ndarray, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Choose documents and their numbers of targets, which add up to `limit`."""
    random = np.random.Generator(np.random.Philox(np.random.SeedSequence(_ORDER_SEED)))
    order = random.permutation(len(counts))
    most = -(-limit // _MIN_DOCUMENTS)
    while np.minimum(counts, most).sum() < limit:
        most *= 2
    taken = np.minimum(counts[order], most)
    until = np.cumsum(taken)
    return order, np.clip(limit - (until - taken), 0, taken)


def _assign(counts: np.ndarray, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Assign documents, longest first, to the shortest sequence so far; return each one's sequence,
    and the load of every sequence.
    """
    sequence_of = np.zeros(len(counts), np.int64)
    loads = np.zeros(batch_size, np.int64)
    heap = [(0, sequence) for sequence in range(batch_size)]
    for document in np.argsort(-counts, kind="stable"):
        _, sequence = heap[0]
        sequence_of[document] = sequence
        loads[sequence] += counts[document]
        heapq.heapreplace(heap, (int(loads[sequence]), sequence))
    return sequence_of, loads


def _lay_out(
    split: TokenSplit,
    starts: np.ndarray,
    counts: np.ndarray,
    loads: np.ndarray,
    shape: tuple[int, int],
    pad_id: int,
    reset_every: int,
) -> Iterator[Batch]:
    """Yield the batches of documents, which are given in the order of their sequences.

    All predictions are on one line, document after document and sequence after sequence. An EOS
    predicts nothing and has no place on it.
    """
    length, num_batches = shape
    document_from = np.cumsum(counts) - counts
    sequence_from = np.cumsum(loads) - loads
    for step in range(num_batches):
        along = np.arange(step * length, (step + 1) * length)
        is_real = along < loads[:, None]
        line = np.where(is_real, sequence_from[:, None] + along, 0)
        document = np.searchsorted(document_from, line, side="right") - 1
        within = line - document_from[document]
        batch = gather(split, starts[document] + within, is_real, pad_id)
        segments = document
        if reset_every:
            within = within % reset_every
            segments = line - within
        yield batch._replace(
            segment_ids=np.where(is_real, segments, counts.sum()).astype(np.int32),
            reset=(within[:, 0] == 0) | (step == 0),
        )
