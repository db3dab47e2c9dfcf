"""One array in several files: random access without copying or mapping them in one place."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np


class ShardedArray:
    """One-dimensional arrays, one after another, read as one.

    A slice is a copy unless it is in one shard. Shards are memory-mapped files: what is not read
    takes no memory.
    """

    def __init__(self, shards: Sequence[np.ndarray]) -> None:
        """Concatenate `shards`, each [n] of the same dtype, at least one."""
        self.shards = [np.asarray(shard) for shard in shards]
        self.dtype = self.shards[0].dtype
        self._starts = np.cumsum([0, *map(len, self.shards)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Copy all shards into memory."""
        return np.concatenate(self.shards).astype(dtype or self.dtype, copy=False)

    def __getitem__(self, index: Any) -> Any:
        """Read a slice without a step, or the elements at an array of positions."""
        if isinstance(index, slice):
            return self._slice(*index.indices(len(self)))
        return self.take(index)

    def take(self, positions: Any, mode: str = "raise") -> np.ndarray:
        """Read the elements at `positions`, as `numpy.take`; the shape is that of `positions`.

        Raises:
          IndexError: a position is not an integer, or is out of range and `mode` is not ``wrap``.
        """
        positions = np.asarray(positions)
        if positions.size and not np.issubdtype(positions.dtype, np.integer):
            raise IndexError(f"positions are integers; got {positions.dtype}")
        positions = positions.astype(np.int64)
        size = len(self)
        if mode == "wrap":
            positions = positions % size
        elif positions.size and not -size <= positions.min() <= positions.max() < size:
            raise IndexError(f"a position is out of range for {size} elements")
        else:
            positions = np.where(positions < 0, positions + size, positions)
        flat = positions.ravel()
        shard = np.searchsorted(self._starts, flat, side="right") - 1
        # Consecutive positions are mostly in one shard.
        changes = np.flatnonzero(np.diff(shard)) + 1
        bounds = [0, *changes.tolist(), len(flat)] if len(flat) else []
        found = np.empty(len(flat), self.dtype)
        for start, stop in itertools.pairwise(bounds):
            number = shard[start]
            found[start:stop] = self.shards[number][flat[start:stop] - self._starts[number]]
        return found.reshape(positions.shape)

    def _slice(self, start: int, stop: int, step: int) -> np.ndarray:
        if step != 1:
            raise IndexError("a slice of a sharded array has no step")
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        parts: list[np.ndarray] = []
        for number in range(first, len(self.shards)):
            begin = int(self._starts[number])
            if begin >= stop and parts:
                break
            shard = self.shards[number]
            parts.append(shard[max(start - begin, 0) : max(stop - begin, 0)])
        if not parts:
            return np.empty(0, self.dtype)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def shards_of(array: "np.ndarray | ShardedArray") -> list[np.ndarray]:
    """Return the shards of an array in order; a plain array is one."""
    return array.shards if isinstance(array, ShardedArray) else [np.asarray(array)]


def joined(shards: Sequence[np.ndarray]) -> "np.ndarray | ShardedArray":
    """Join shards without reading them; one stays the plain array that it is."""
    return shards[0] if len(shards) == 1 else ShardedArray(shards)


def without_memmap(array: "np.ndarray | ShardedArray") -> "np.ndarray | ShardedArray":
    """Return a plain array over the same memory, since indexing the memmap class costs more."""
    return array if isinstance(array, ShardedArray) else np.asarray(array)
