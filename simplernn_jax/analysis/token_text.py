"""Readable text of tokens: whole characters, visible spaces, and labels of plots."""

import functools
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from simplernn_jax.data import Tokenizer
from simplernn_jax.inference.text import TextStream

MONOSPACE = {"fontfamily": "DejaVu Sans Mono", "fontsize": 8}
"""Style of quotations in plots; the font comes with matplotlib."""
LABEL = 12
"""Most characters of a quotation in a plot."""
_NEIGHBORS = 12
"""Units on each side of a unit that a label searches for the rest of its word."""

_VISIBLE = {"\n": "⏎", "\t": "⇥", " ": "·", "\r": "␍"}


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


def begins_word(units: Sequence[Unit], index: int) -> bool:
    """Return whether a word begins at this unit, as after a space or at the first unit."""
    text = units[index].text
    if not text.strip():
        return False
    return index == 0 or text[0].isspace() or units[index - 1].text[-1:].isspace()


def visible(text: str) -> str:
    """Return `text` on one line with visible spaces, tabs and line ends."""
    return "".join(_VISIBLE.get(c) or (c if c.isprintable() else escaped(c)) for c in text)


def quoted(text: str) -> str:
    """Return `text` in quotation marks; a whitespace character is named too."""
    name = {" ": " (a space)", "\n": " (a line end)", "\t": " (a tab)"}.get(text, "")
    return f"“{visible(text)}”{name}"


def sum_by_unit(units: Sequence[Unit], values: np.ndarray) -> np.ndarray:
    """Return [units]: the sum of the [n] `values` over each unit's tokens."""
    return np.add.reduceat(values, [unit.start for unit in units])


def escaped(character: str) -> str:
    r"""Return the ASCII escape of one character, such as ``\u6f22``."""
    return character.encode("unicode_escape").decode("ascii")


def beginning(text: str, most: int) -> str:
    """Return the beginning of `text` in at most `most` characters, with an ellipsis if it is cut.

    A character that the font lacks is replaced by its escape, whole or left out.
    """
    drawn = list(map(_drawn, text))
    if len("".join(drawn)) <= most:
        return "".join(drawn)
    while len("".join(drawn)) >= most:
        drawn.pop()
    return "".join(drawn) + "…"


def ending(text: str, most: int) -> str:
    """Return the end of `text` in the same way, without an ellipsis."""
    drawn = list(map(_drawn, text))
    while len("".join(drawn)) > most:
        drawn.pop(0)
    return "".join(drawn)


def label_text(axis: Any, units: Sequence[Unit], offset: int, most: int) -> None:
    """Label an axis of tokens with its text: ticks at the beginnings of words, with whole words.

    `offset` is the position of the first token in its document, `most` the number of ticks at most.
    """
    places = [index for index in range(len(units)) if begins_word(units, index)]
    if len(places) <= most // 2:  # some languages have no spaces
        places = list(range(len(units)))
    step = -(-units[-1].stop // most)
    ticks: list[int] = []
    names = []
    for place in places:
        start = units[place].start
        if not ticks or start - ticks[-1] >= step:
            ticks.append(start)
            names.append(f"{words_from(units, place)} {offset + start}")
    axis.set_ticks(ticks, names, **MONOSPACE)


def words_from(units: Sequence[Unit], first: int) -> str:
    """Return the whole words from unit `first` that fit a label, or the beginning of the first."""
    text = "".join(unit.text for unit in units[first : first + LABEL + 1]).strip()
    ends = [space.start() for space in re.finditer(r"\s+|$", text)]
    fitting = [end for end in ends if len("".join(map(_drawn, text[:end]))) <= LABEL]
    return beginning(text[: max(fitting, default=ends[0])], LABEL)


def label_unit(units: Sequence[Unit], index: int) -> str:
    """Return a unit in brackets within its word, or between two, and its distance to the end."""
    start, stop = index, index + 1
    while start > 0 and not begins_word(units, start) and index - start < _NEIGHBORS:
        start -= 1
    while stop < len(units) and not units[stop].text[0].isspace() and stop - index < _NEIGHBORS:
        stop += 1
    before = "".join(unit.text for unit in units[start:index]).lstrip()
    after = "".join(unit.text for unit in units[index + 1 : stop])
    whole = ending(before, 10)
    left = whole if whole == ending(before, 1000) else f"…{ending(before, 9)}"
    text = f"{left}[{beginning(units[index].text, LABEL)}]{beginning(after, 7)}"
    return f"{text:>15} {units[-1].stop - units[index].start:>4}"


def _drawn(character: str) -> str:
    shown = visible(character)
    return shown if all(ord(c) in _glyphs() for c in shown) else escaped(character)


@functools.cache
def _glyphs() -> frozenset[int]:
    from matplotlib import font_manager

    return frozenset(
        font_manager.get_font(font_manager.findfont(str(MONOSPACE["fontfamily"]))).get_charmap()
    )
