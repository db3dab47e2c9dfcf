"""An n-gram model of bytes, with which models of this project are compared."""

from collections.abc import Iterator
from typing import Any

import numpy as np

ORDER = 8


class NGrams:
    """Counts of the 1 to `ORDER` consecutive bytes that end at each place of a text.

    `text` is [n] bytes, or ids of the tokenizer ``byte``; special ones are left out.
    """

    def __init__(self, text: Any) -> None:
        self._tables = []
        for grams in _grams(np.asarray(text)):
            grams, counts = np.unique(grams, return_counts=True)
            contexts, first, kinds = np.unique(grams >> 8, return_index=True, return_counts=True)
            self._tables.append((grams, counts, contexts, np.add.reduceat(counts, first), kinds))

    def predict(self, before: bytes) -> int:
        """Return the byte that followed the longest known end of `before` most often."""
        for length in range(min(ORDER - 1, len(before)), -1, -1):
            grams, counts, *_ = self._tables[length]
            context = int.from_bytes(before[len(before) - length :]) << 8
            start, stop = np.searchsorted(grams, np.array([context, context + 256], np.uint64))
            if start < stop:
                return int(grams[start + np.argmax(counts[start:stop])] & np.uint64(255))
        raise AssertionError("the empty context is known")

    def bits(self, text: bytes) -> np.ndarray:
        """Return the bits of each byte given those before, by Witten and Bell's backoff (1991)."""
        data = np.frombuffer(text, np.uint8)
        p = np.full(len(data), 1 / 256)
        for found, (grams, counts, contexts, *others) in zip(
            _grams(data), self._tables, strict=True
        ):
            count = _look_up(found, grams, counts)
            total, kinds = (_look_up(found >> 8, contexts, values) for values in others)
            p = np.where(total > 0, (count + kinds * p) / np.maximum(total + kinds, 1), p)
        return -np.log2(p)


def _grams(text: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the last 1 to `ORDER` bytes of each place, as numbers; zeros precede the text."""
    padded = np.concatenate([np.zeros(ORDER - 1), text[text < 256]]).astype(np.uint64)
    grams = np.zeros(len(padded) - ORDER + 1, np.uint64)
    for before in range(ORDER):
        part = padded[ORDER - 1 - before : len(padded) - before]
        grams = grams | (part << np.uint64(8 * before))
        yield grams


def _look_up(wanted: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)
