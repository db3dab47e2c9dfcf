"""Readable text of tokens: whole characters and visible spaces."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from simplernn_jax.data import Tokenizer
from simplernn_jax.inference.text import TextStream

_VISIBLE = str.maketrans({"\n": "⏎", "\t": "⇥", " ": "·", "\r": "␍"})


class Unit(NamedTuple):
    """Smallest sequence of tokens that ends at the end of a character."""

    start: int
    """Index of its first token."""
    stop: int
    """Index after its last token."""
    text: str
    """Text, the name of a special token, or the bytes of an incomplete character."""


def split_into_units(
    tokenizer: Tokenizer, ids: Sequence[int] | np.ndarray, context: Sequence[int] | np.ndarray = ()
) -> list[Unit]:
    """Split [n] ids into units that hold every id once, in order.

    A character that begins in `context`, the ids before, is completed in the first unit.
    """
    names = {tokenizer.bos_id: "⟨BOS⟩", tokenizer.eos_id: "⟨EOS⟩", tokenizer.pad_id: "⟨PAD⟩"}
    stream = TextStream(tokenizer, context)
    units: list[Unit] = []
    start = 0
    for index, token in enumerate(int(token) for token in ids):
        text = names.get(token) or stream.feed([token])
        if text:
            units.append(Unit(start, index + 1, text))
            start = index + 1
    if start < len(ids):
        rest = tokenizer.decode_bytes(ids[start:])
        units.append(Unit(start, len(ids), "".join(f"\\x{byte:02x}" for byte in rest) or "\ufffd"))
    return units


def sum_by_unit(units: Sequence[Unit], values: np.ndarray) -> np.ndarray:
    """Return [units]: the sum of the [n] `values` over each unit's tokens."""
    return np.add.reduceat(values, [unit.start for unit in units])


def visible(text: str) -> str:
    """Return `text` on one line, with a visible character in place of each invisible one."""
    shown = text.translate(_VISIBLE)
    return "".join(c if c.isprintable() else "\ufffd" for c in shown)
