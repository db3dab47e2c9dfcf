"""Readable text of tokens: whole characters, visible spaces, and labels of pictures."""

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from simplernn_jax.data import Tokenizer
from simplernn_jax.inference.text import TextStream

MONOSPACE = {"fontfamily": "DejaVu Sans Mono", "fontsize": 8}
"""Style of quotations in pictures; the font comes with matplotlib."""
LABEL = 12
"""Most characters of a quotation in a picture."""
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
    """Its text, the name of a special token, or the bytes of an incomplete character."""


def split_into_units(
    tokenizer: Tokenizer, ids: Sequence[int] | np.ndarray, context: Sequence[int] | np.ndarray = ()
) -> list[Unit]:
    """Split [n] ids into units that hold every id once, in order.

    Args:
      tokenizer: decodes the ids.
      ids: the tokens to show.
      context: the ids before; a character that begins there is completed in the first unit.
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


def begins_word(units: Sequence[Unit], index: int) -> bool:
    """Whether a word begins at this unit, as after a space or at the first unit."""
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
    if sum(map(len, drawn)) <= most:
        return "".join(drawn)
    return "".join(_that_fit(drawn, most - 1)) + "…"


def ending(text: str, most: int) -> str:
    """Return the end of `text` in the same way, without an ellipsis."""
    return "".join(reversed(_that_fit(list(map(_drawn, reversed(text))), most)))


def label_text(axis: Any, units: Sequence[Unit], offset: int, most: int) -> None:
    """Label an axis of tokens with its text: ticks at the beginnings of words, with whole words.

    Args:
      axis: of an image whose cells are tokens.
      units: of the tokens shown.
      offset: position of the first token in its document.
      most: number of ticks, about.
    """
    length = units[-1].stop
    step = -(-length // most)
    # Some languages have no spaces.
    has_words = sum(begins_word(units, index) for index in range(len(units))) > most // 2
    ticks: list[int] = []
    names = []
    for place in range(0, length, step):
        inside = [i for i, unit in enumerate(units) if place <= unit.start < place + step]
        if inside:
            first = next((i for i in inside if begins_word(units, i)), None)
            if first is None and has_words:
                continue
            first = inside[0] if first is None else first
            start = units[first].start
            if ticks and start - ticks[-1] < 0.7 * step:  # their texts would touch
                continue
            ticks.append(start)
            names.append(f"{words_from(units, first, step)} {offset + start}")
    axis.set_ticks(ticks, names, **MONOSPACE)


def words_from(units: Sequence[Unit], first: int, tokens: int) -> str:
    """Return the whole words from unit `first` that begin within `tokens` tokens and fit a label.

    A first word that does not fit is cut and ends in an ellipsis.
    """
    end = units[first].start + tokens
    shown = ""
    for stop in range(first + 1, len(units)):
        if begins_word(units, stop) or units[stop].text.isspace():
            text = "".join(unit.text for unit in units[first:stop]).strip()
            if shown and (len("".join(map(_drawn, text))) > LABEL or units[stop - 1].start >= end):
                break
            shown = text
    return beginning(shown or "".join(unit.text for unit in units[first:]).strip(), LABEL)


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


def _that_fit(drawn: Sequence[str], most: int) -> Sequence[str]:
    """Return the first of `drawn` with at most `most` characters in all."""
    ends = itertools.accumulate(map(len, drawn))
    return [text for text, end in zip(drawn, ends, strict=True) if end <= most]


def _drawn(character: str) -> str:
    shown = visible(character)
    return shown if all(ord(c) in _glyphs() for c in shown) else escaped(character)


@functools.cache
def _glyphs() -> frozenset[int]:
    from matplotlib import font_manager

    return frozenset(
        font_manager.get_font(font_manager.findfont(str(MONOSPACE["fontfamily"]))).get_charmap()
    )
