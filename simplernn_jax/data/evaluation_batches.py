"""Batches of evaluation: each prediction of a split once, with a carried state or in contexts."""

import dataclasses
import heapq
from collections.abc import Iterator

import numpy as np

from simplernn_jax.data.batches import Batch, divide_up, document_ends, gather, round_up
from simplernn_jax.data.token_split import TokenSplit
from simplernn_jax.errors import UserError, counted

_ORDER_SEED = 20240229
"""Seed of the order of documents in a limited evaluation, the same in every run."""

_MIN_DOCUMENTS = 8
"""Documents that a limited evaluation covers at least, if there are as many."""


@dataclasses.dataclass(frozen=True)
class Contexts:
    """Overlapping contexts, each from the initial state, for a model without a carried state.

    A context begins every `stride` tokens of a document. The first one scores all its predictions,
    each other one only its last `stride`, which no earlier context scores and which see at least
    ``length - stride + 1`` tokens, or all that precede them in the document.

    Raises:
      UserError: the contexts do not advance, or leave tokens out.
    """

    length: int
    """Tokens of a context."""
    stride: int
    """Tokens between the starts of consecutive contexts, in [1, length]; `length` resets the state
    every `length` tokens."""

    def __post_init__(self) -> None:
        if not 1 <= self.stride <= self.length:
            raise UserError(
                f"contexts of {self.length} tokens, one every {self.stride}: the stride must be at "
                "least 1 and at most the length, or tokens would be left out"
            )


def evaluation_batches(
    split: TokenSplit,
    batch_tokens: int,
    max_batch_size: int,
    pad_id: int,
    limit_tokens: int = 0,
    reset_every: int = 0,
    divisible_by: tuple[int, int] = (1, 1),
    aligned: bool = False,
) -> Iterator[Batch]:
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
      aligned: begin every document at the start of a batch, at the cost of padding.

    Returns:
      The batches, all of one shape [B, T].

    Raises:
      UserError: the split has no prediction.
    """
    starts, counts = scored_documents(split, limit_tokens)
    batch_size = int(max(1, min(max_batch_size, len(counts), counts.sum() // counts.max())))
    batch_size = round_up(batch_size, divisible_by[0])
    length, places = max(1, batch_tokens // batch_size), counts
    if aligned:
        # One long document among short ones must not make batches of padding.
        usual = max(1, min(int(counts.max()), 4 * int(np.median(counts))))
        length = round_up(min(length, usual), divisible_by[1])
        places = divide_up(counts, length) * length
    sequence_of, loads = _assign(places, batch_size)
    order = np.argsort(sequence_of, kind="stable")
    starts, counts, places = starts[order], counts[order], places[order]
    length = round_up(min(length, int(loads.max())), divisible_by[1])
    # All predictions are on one line, document after document and sequence after sequence. An EOS
    # predicts nothing and has no place on it.
    document_from = np.cumsum(places) - places
    sequence_from = np.cumsum(loads) - loads

    def lay_out() -> Iterator[Batch]:
        for step in range(divide_up(int(loads.max()), length)):
            along = np.arange(step * length, (step + 1) * length)
            is_real = along < loads[:, None]
            line = np.where(is_real, sequence_from[:, None] + along, 0)
            document = np.searchsorted(document_from, line, side="right") - 1
            within = line - document_from[document]
            is_real &= within < counts[document]
            batch = gather(split, starts[document] + within, is_real, pad_id)
            segments = document
            if reset_every:
                within = within % reset_every
                segments = line - within
            yield batch._replace(
                segment_ids=np.where(is_real, segments, counts.sum()).astype(np.int32),
                reset=(within[:, 0] == 0) | (step == 0),
            )

    return lay_out()


def context_batches(
    split: TokenSplit,
    contexts: Contexts,
    batch_tokens: int,
    max_batch_size: int,
    pad_id: int,
    limit_tokens: int = 0,
    divisible_by: tuple[int, int] = (1, 1),
) -> Iterator[Batch]:
    """Lay out overlapping contexts that score each prediction of `split` once.

    Args and returns are the same as of `evaluation_batches`, which scores the same predictions;
    at least one context is in a batch.

    Raises:
      UserError: the split has no prediction.
    """
    length, stride = contexts.length, contexts.stride
    starts, counts = scored_documents(split, limit_tokens)
    per_document = 1 + np.maximum(0, divide_up(counts - length, stride))
    document = np.repeat(np.arange(len(counts)), per_document)
    nth = np.arange(len(document)) - np.repeat(np.cumsum(per_document) - per_document, per_document)
    begins = starts[document] + nth * stride
    lengths = np.minimum(length, counts[document] - nth * stride)
    skips = np.where(nth == 0, 0, length - stride)
    longest = round_up(int(lengths.max()), divisible_by[1])
    batch_size = max(1, min(max_batch_size, batch_tokens // longest, len(document)))
    batch_size = round_up(batch_size, divisible_by[0])
    number = divide_up(len(document), batch_size)

    def lay_out() -> Iterator[Batch]:
        along = np.arange(longest)
        padding = np.zeros(number * batch_size - len(document), np.int64)
        table = np.stack([np.append(column, padding) for column in (begins, lengths, skips)])
        for begin, count, skip in table.reshape(3, number, batch_size, 1).swapaxes(0, 1):
            batch = gather(split, begin + along, along < count, pad_id)
            yield batch._replace(loss_mask=batch.loss_mask & (along >= skip))

    return lay_out()


def scored_documents(split: TokenSplit, limit_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Choose the documents to score; return their starts and numbers of predictions."""
    check_scorable(split)
    starts = split.document_starts
    counts = document_ends(split) - starts - 1
    if limit_tokens and limit_tokens < split.num_predictions:
        if split.targets is None:
            order, counts = _choose(counts, limit_tokens)
            starts = starts[order]
        else:
            numbers = [len(places) for places in _target_places(split, starts, counts)]
            order, chosen = _choose(np.array(numbers), limit_tokens)
            starts, counts = starts[order], counts[order]
            places_of = zip(_target_places(split, starts, counts), chosen, strict=True)
            # Up to the last one of its targets that are scored.
            counts = np.array([places[n - 1] + 1 if n else 0 for places, n in places_of])
    return starts[counts > 0], counts[counts > 0]


def _target_places(
    split: TokenSplit, starts: np.ndarray, counts: np.ndarray
) -> Iterator[np.ndarray]:
    """Yield where the targets are among the `counts` tokens after each of the `starts`."""
    assert split.targets is not None
    for start, count in zip(starts.tolist(), counts.tolist(), strict=True):
        yield np.flatnonzero(split.targets[start + 1 : start + 1 + count])


def check_scorable(split: TokenSplit) -> None:
    """Raise `UserError` if a split has nothing to predict."""
    if not split.num_predictions:
        what = "is a target" if split.targets is not None else "follows another in its document"
        raise UserError(
            f"nothing to score: the {split.name} split has {counted(len(split.tokens), 'token')} "
            f"and none of them {what}; use more text or a larger "
            "config.data.validation_fraction"
        )


def _choose(counts: np.ndarray, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Choose documents and their numbers of targets, which add up to `limit`."""
    random = np.random.Generator(np.random.Philox(np.random.SeedSequence(_ORDER_SEED)))
    order = random.permutation(len(counts))
    most = divide_up(limit, _MIN_DOCUMENTS)
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
