"""Tokens of one side of the split, memory-mapped, of one source or of a mixture."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from simplernn_jax.files import sha256_hex

TOKEN_DTYPES = ("|u1", "<u2", "<u4")
"""Dtypes of stored token ids, narrowest first."""


def token_dtype(vocab_size: int) -> np.dtype:
    """Smallest unsigned dtype that holds every id."""
    return next(
        dtype for dtype in map(np.dtype, TOKEN_DTYPES) if vocab_size <= np.iinfo(dtype).max + 1
    )


class ShardedArray:
    """One-dimensional arrays, one after another, read as one; what is read is copied.

    Shards are memory-mapped files: what is not read takes no memory.
    """

    def __init__(self, shards: Sequence[np.ndarray]) -> None:
        """Concatenate `shards`, each [n] of the same dtype, at least one."""
        self.shards = list(shards)
        self.dtype = self.shards[0].dtype
        self._starts = np.cumsum([0, *map(len, self.shards)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Copy all shards into memory."""
        return np.concatenate(self.shards).astype(dtype or self.dtype, copy=False)

    def __getitem__(self, index: Any) -> np.ndarray:
        """Read a slice, or the elements at an array of positions."""
        if not isinstance(index, slice):
            return self.take(index)
        start, stop, step = index.indices(len(self))
        if step != 1:
            return self.take(np.arange(start, stop, step))
        begins = self._starts[:-1].tolist()
        return np.concatenate(
            [
                shard[max(start - begin, 0) : max(stop - begin, 0)]
                for shard, begin in zip(self.shards, begins, strict=True)
            ]
        )

    def take(self, positions: Any, mode: str = "raise") -> np.ndarray:
        """Read the elements at `positions`, in the shape of `positions`, as `numpy.take` does.

        Raises:
          IndexError: a position is negative or too large, and `mode` is not ``wrap``.
        """
        positions = np.asarray(positions)
        if mode == "wrap":
            positions = positions % len(self)
        elif positions.size and not 0 <= positions.min() <= positions.max() < len(self):
            raise IndexError(f"a position is out of range for {len(self)} elements")
        shard = np.searchsorted(self._starts, positions, side="right") - 1
        found = np.empty(positions.shape, self.dtype)
        for number in np.unique(shard):
            here = shard == number
            found[here] = self.shards[number][positions[here] - self._starts[number]]
        return found


def shards_of(array: np.ndarray | ShardedArray) -> list[np.ndarray]:
    """Return the shards of an array in order; a plain array is one."""
    return array.shards if isinstance(array, ShardedArray) else [array]


def joined(shards: Sequence[np.ndarray]) -> np.ndarray | ShardedArray:
    """Join shards without reading them; one stays the plain array that it is."""
    return shards[0] if len(shards) == 1 else ShardedArray(shards)


@dataclasses.dataclass(frozen=True)
class TokenSplit:
    """One side of the split: consecutive documents, each BOS, its tokens, EOS."""

    name: str
    """``train`` or ``validation``."""
    tokens: np.ndarray | ShardedArray
    """[N] memory-mapped ids, the smallest unsigned dtype that holds the vocabulary."""
    document_starts: np.ndarray
    """[documents] int64, position of the first token of each document. A position split cuts one
    document: its rest begins the validation split at 0, without a BOS."""
    num_bytes: int
    """UTF-8 bytes of its targets."""
    content_hash: str
    """SHA-256 of the tokens, the document starts and the targets."""
    targets: np.ndarray | ShardedArray | None = None
    """[N] memory-mapped bool, whether a token is a target of the loss; None: all that follow
    another in their document."""

    @functools.cached_property
    def num_predictions(self) -> int:
        """Number of targets: tokens that follow another one in their document."""
        if self.targets is not None:
            return sum(int(np.count_nonzero(shard)) for shard in shards_of(self.targets))
        return len(self.tokens) - len(self.document_starts)


@dataclasses.dataclass(frozen=True)
class MixedSplit(TokenSplit):
    """Union of the splits of several sources, whose documents follow one another."""

    sources: tuple[str, ...] = ()
    parts: tuple[TokenSplit, ...] = ()
    """The split of each source, with its source before its name."""
    weights: tuple[float, ...] = ()
    """Probability of each source in training; their sum is 1."""


def union(
    name: str, splits: Sequence[TokenSplit], sources: Sequence[str], weights: Sequence[float]
) -> MixedSplit:
    """Create the split of a mixture from the splits of its sources."""
    sizes = np.array([len(split.tokens) for split in splits])
    offsets = np.cumsum(sizes) - sizes
    starts = [split.document_starts + at for split, at in zip(splits, offsets, strict=True)]
    targets = None
    if any(split.targets is not None for split in splits):
        targets = joined([shard for split in splits for shard in shards_of(_targets(split))])
    return MixedSplit(
        name,
        joined([shard for split in splits for shard in shards_of(split.tokens)]),
        np.concatenate(starts),
        sum(split.num_bytes for split in splits),
        sha256_hex("".join(split.content_hash for split in splits)),
        targets,
        tuple(sources),
        tuple(
            dataclasses.replace(split, name=f"{source} {split.name}")
            for split, source in zip(splits, sources, strict=True)
        ),
        tuple(weights),
    )


def _targets(split: TokenSplit) -> np.ndarray | ShardedArray:
    """Return whether each token is a target, also of a split in which all are."""
    if split.targets is not None:
        return split.targets
    targets = np.ones(len(split.tokens), np.bool_)
    targets[split.document_starts] = False
    return targets
