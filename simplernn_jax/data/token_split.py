"""Tokens of one side of the split, memory-mapped, of one source or of a mixture."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from simplernn_jax.files import sha256_hex


class ConcatenatedArray:
    """One-dimensional arrays, one after another, read as one; what is read is copied."""

    def __init__(self, arrays: Sequence[np.ndarray]) -> None:
        """Concatenate `arrays`, each [n] of the same dtype, at least one."""
        self._arrays = arrays
        self._starts = np.cumsum([0, *map(len, arrays)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Copy all arrays into memory."""
        return np.concatenate(self._arrays, dtype=dtype)

    def __getitem__(self, index: Any) -> np.ndarray:
        """Read a slice, or the elements at an array of positions from 0."""
        if isinstance(index, slice):
            index = np.arange(*index.indices(len(self)))
        found = np.empty(index.shape, self._arrays[0].dtype)
        chosen = np.searchsorted(self._starts, index, side="right") - 1
        for number, array in enumerate(self._arrays):
            here = chosen == number
            found[here] = array[index[here] - self._starts[number]]
        return found


@dataclasses.dataclass(frozen=True)
class TokenSplit:
    """One side of the split: consecutive documents, each BOS, its tokens, EOS."""

    name: str
    """``train`` or ``validation``."""
    tokens: np.ndarray | ConcatenatedArray
    """[N] memory-mapped ids, the smallest unsigned dtype that holds the vocabulary."""
    document_starts: np.ndarray
    """[documents] int64, position of the first token of each document. A position split cuts one
    document: its rest begins the validation split at 0, without a BOS."""
    num_bytes: int
    """UTF-8 bytes of its targets."""
    content_hash: str
    """SHA-256 of the tokens, the document starts and the targets."""
    targets: np.ndarray | ConcatenatedArray | None = None
    """[N] memory-mapped bool, whether a token is a target of the loss; None: all that follow
    another in their document."""

    parts: "tuple[TokenSplit, ...]" = ()
    """Of a mixture: the split of each source, with its source before its name. Their documents
    follow one another in this split."""
    weights: tuple[float, ...] = ()
    """Of a mixture: the probability of each source in training; their sum is 1."""

    @functools.cached_property
    def num_predictions(self) -> int:
        """Number of targets: tokens that follow another one in their document."""
        if self.parts:
            return sum(part.num_predictions for part in self.parts)
        if self.targets is not None:
            return int(np.count_nonzero(self.targets))
        return len(self.tokens) - len(self.document_starts)


def union(
    name: str, splits: Sequence[TokenSplit], sources: Sequence[str], weights: Sequence[float]
) -> TokenSplit:
    """Create the split of a mixture from the splits of its sources."""
    sizes = np.array([len(split.tokens) for split in splits])
    offsets = np.cumsum(sizes) - sizes
    starts = [split.document_starts + at for split, at in zip(splits, offsets, strict=True)]
    has_targets = any(split.targets is not None for split in splits)
    named = zip(splits, sources, strict=True)
    return TokenSplit(
        name,
        ConcatenatedArray([np.asarray(split.tokens) for split in splits]),
        np.concatenate(starts),
        sum(split.num_bytes for split in splits),
        sha256_hex("".join(split.content_hash for split in splits)),
        ConcatenatedArray([_targets(split) for split in splits]) if has_targets else None,
        tuple(dataclasses.replace(part, name=f"{source} {part.name}") for part, source in named),
        tuple(weights),
    )


def _targets(split: TokenSplit) -> np.ndarray:
    """Return whether each token is a target, also of a split in which all are."""
    if split.targets is not None:
        return np.asarray(split.targets)
    targets = np.ones(len(split.tokens), np.bool_)
    targets[split.document_starts] = False
    return targets
