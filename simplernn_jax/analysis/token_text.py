"""Tokens as a person can read them: whole characters, visible spaces, names for specials."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from simplernn_jax.data import Tokenizer
from simplernn_jax.inference.text import TextStream

_VISIBLE = {"\n": "⏎", "\t": "⇥", " ": "·", "\r": "␍"}


class Unit(NamedTuple):
    """The smallest run of tokens that ends where a character ends."""

    start: int
    """Index of its first token."""
    stop: int
    """Index after its last token."""
    text: str
    """Its text as it is, the name of a special token, or the bytes of an unfinished character."""


def split_into_units(
    tokenizer: Tokenizer, ids: Sequence[int] | np.ndarray, context: Sequence[int] | np.ndarray = ()
) -> list[Unit]:
    """Cuts [n] ids into units; together they hold every id once, in order.

    Args:
      tokenizer: decodes the ids.
      ids: what to show.
      context: the ids before; the rest of a character that began there opens the first unit.
    """
    names = {
        tokenizer.bos_id: "⟨BOS⟩",
        tokenizer.eos_id: "⟨EOS⟩",
        tokenizer.pad_id: "⟨PAD⟩",
    }
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


def visible(text: str) -> str:
    """`text` on one line with spaces, tabs and line ends to be seen."""
    return "".join(_VISIBLE.get(c) or (c if c.isprintable() else escaped(c)) for c in text)


def counted(number: int, noun: str) -> str:
    """``1 token`` or ``1,000 tokens``."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def sum_by_unit(units: Sequence[Unit], values: np.ndarray) -> np.ndarray:
    """[units]: the sum of the [n] `values` of each unit's tokens."""
    return np.add.reduceat(values, [unit.start for unit in units])


def escaped(character: str) -> str:
    r"""One character as its code point in ASCII, such as ``\u6f22``."""
    return character.encode("unicode_escape").decode("ascii")
