"""Recurrent states after prefixes of earlier prompts, least recently used ones evicted first.

States are kept at multiples of `GRID` tokens only. A prompt is always prefilled in chunks that end
there, so a state from the cache has the bits of one computed anew.
"""

import hashlib
from collections import OrderedDict
from typing import Any, NamedTuple

import jax
import numpy as np

from simplernn_jax.array_types import ModelState

GRID = 64
"""Tokens between states."""


class Checkpoint(NamedTuple):
    """State of one sequence after a prefix."""

    layers: ModelState
    logits: jax.Array
    """[vocab] float32 logits of the next token."""


def prefix_keys(root: bytes, tokens: np.ndarray) -> list[bytes]:
    """Digest each prefix of GRID, 2 GRID, ... tokens; `root` identifies what comes before them."""
    keys = []
    for start in range(0, len(tokens) - GRID + 1, GRID):
        root = hashlib.sha256(root + tokens[start : start + GRID].astype("<i4").tobytes()).digest()
        keys.append(root)
    return keys


def is_kept(position: int, length: int) -> bool:
    """Decide whether the state at `position` of a prompt of `length` tokens is worth its memory.

    The last one always is. Of the others, the distances grow in proportion to the position, so that
    a long prompt keeps few, and any prompt that shares a prefix with it reuses most of that.
    """
    spacing = GRID << max(0, (position // GRID).bit_length() - 5)
    return position % spacing == 0 or position + GRID > length


class PrefixCache:
    """Map from prefix to `Checkpoint`, bounded in bytes."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.num_evicted = 0
        self._entries: OrderedDict[bytes, Checkpoint] = OrderedDict()

    def longest(self, keys: list[bytes]) -> tuple[int, Checkpoint | None]:
        """Return the longest cached prefix: its number of keys and its state, or (0, None)."""
        for index in range(len(keys), 0, -1):
            if keys[index - 1] in self._entries:
                self._entries.move_to_end(keys[index - 1])
                return index, self._entries[keys[index - 1]]
        return 0, None

    def add(self, key: bytes, checkpoint: Checkpoint) -> None:
        """Add a state, and evict others until all fit."""
        size = _num_bytes(checkpoint)
        if key in self._entries or size > self.max_bytes:
            return
        self._entries[key] = checkpoint
        self.num_bytes += size
        while self.num_bytes > self.max_bytes:
            _, evicted = self._entries.popitem(last=False)
            self.num_bytes -= _num_bytes(evicted)
            self.num_evicted += 1

    def clear(self) -> None:
        """Forget all states."""
        self._entries.clear()
        self.num_bytes = 0


def _num_bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
