"""Batches of evaluation by overlapping windows, each from a zero state."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from simplernn_jax.data.batches import Batch, gather
from simplernn_jax.data.evaluation_batches import round_up, scored_documents
from simplernn_jax.data.token_store import TokenSplit
from simplernn_jax.errors import UserError


class Windows(NamedTuple):
    """How a model without a carried state sees a document.

    Windows begin every `stride` tokens of a document. The first one scores all that it predicts,
    each other one only what no earlier window does: its last `stride` predictions, which have read
    at least ``length - stride + 1`` tokens, or as many as the document has before them.
    """

    length: int
    """Tokens that a window reads."""
    stride: int
    """Tokens from one window's start to the next one's, in [1, length]; the same as `length`
    clears the state after every so many tokens."""


def check_windows(windows: Windows) -> None:
    """Checks that windows go on, and that no token lies between two of them.

    Raises:
      UserError: their stride is below 1 or above their length.
    """
    length, stride = windows
    if not 1 <= stride <= length:
        raise UserError(
            f"windows of {length} tokens, one every {stride}: the stride must be at least 1 and at "
            "most the length, or tokens would be left out"
        )


def window_batches(
    split: TokenSplit,
    windows: Windows,
    batch_tokens: int,
    pad_id: int,
    limit_tokens: int = 0,
    divisible_by: tuple[int, int] = (1, 1),
) -> tuple[Iterator[Batch], int]:
    """Batches of windows that score each prediction of `split` exactly once.

    Args:
      split: what to score.
      windows: their length and stride.
      batch_tokens: most tokens of a batch, R T; at least one window is taken.
      pad_id: input and target where a document has ended (`loss_mask` False).
      limit_tokens: above 0, only so many predictions, the same that `evaluation_batches` scores.
      divisible_by: what R and T are multiples of, at the cost of padding.

    Returns:
      The batches, all of one shape [R, T], and how many there are.

    Raises:
      UserError: the split holds nothing to predict, or no such windows are possible.
    """
    check_windows(windows)
    length, stride = windows
    starts, counts = scored_documents(split, limit_tokens)
    per_document = 1 + np.maximum(0, -(-(counts - length) // stride))
    document = np.repeat(np.arange(len(counts)), per_document)
    nth = np.arange(len(document)) - np.repeat(np.cumsum(per_document) - per_document, per_document)
    begins = nth * stride
    reads = np.minimum(length, counts[document] - begins)
    skips = np.where(nth == 0, 0, length - stride)
    longest = round_up(int(reads.max()), divisible_by[1])
    rows = round_up(max(1, min(batch_tokens // longest, len(document))), divisible_by[0])
    number = -(-len(document) // rows)

    def lay_out() -> Iterator[Batch]:
        tokens = np.asarray(split.tokens)
        along = np.arange(longest)
        for first in range(0, len(document), rows):
            chosen = slice(first, first + rows)
            empty = np.zeros(rows - len(document[chosen]), np.int64)
            start, read, skip = (
                np.append(values[chosen], empty)[:, None]
                for values in (starts[document] + begins, reads, skips)
            )
            is_real = along < read
            inputs, targets = gather(tokens, start + along, is_real, pad_id)
            yield Batch(
                tokens=inputs,
                targets=targets,
                loss_mask=is_real & (along >= skip),
                segment_ids=(~is_real).astype(np.int32),
                reset=np.ones(rows, bool),
            )

    return lay_out(), number
