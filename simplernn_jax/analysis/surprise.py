"""The surprising lines, words or tokens of a text, from the bits of its tokens.

A unit is ranked by its most surprising token: by the bits that this has beyond those that the model
expected, so that random digits, which the model knows to be random, count little.
"""

import codecs
import itertools
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from simplernn_jax.errors import UserError
from simplernn_jax.files import page_template
from simplernn_jax.inference.scoring import Place, ScoredBlock

BLOCK_BYTES = 1 << 14
"""Bytes that are read at a time; a line of more is several units."""
LEVELS = (1, 2, 4, 6, 9, 13)
"""Bits more than expected, from which each color of the page is used."""
_MAX_KINDS, _KIND_BYTES = 1 << 12, 200
"""Kinds of lines whose average is remembered, and bytes of a line that decide its kind."""
_RECENT = 10_000
"""Units whose surprise is compared in a stream."""

_DATE = rb"\b\d{4}[-/]\d\d[-/]\d\d"
_CLOCK = rb"\d{1,2}:\d\d(?::\d\d(?:[.,]\d+)?)?(?:Z|[+-]\d\d:?\d\d)?"
MASKS = {
    "uuid": rb"\b[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}\b",
    "time": _DATE + rb"[T ]+" + _CLOCK + rb"|\b(?:[A-Z]\w\w [ \d]\d )?" + _CLOCK + rb"|" + _DATE,
    "hex": rb"\b0x[0-9a-fA-F]+\b|\b(?=[a-fA-F]*\d)[0-9a-fA-F]{6,}\b",
    "digits": rb"\d+",
}
"""Patterns of fields that vary; one that may be a part of another comes after it."""


class Unit(NamedTuple):
    """A line, a word with the space before it, or a token of a text."""

    line: int  # from 1
    column: int  # bytes of its line before it
    text: bytes  # without the end of the line
    bits: float
    surprise: float  # what units are ranked by
    peak: int  # position in `text` of the most surprising character
    place: Place  # the text before that character

    def around_peak(self) -> tuple[str, str, str]:
        """Return the text before its most surprising character, that character, and the rest."""
        before = self.text[: self.peak].decode("utf-8", "replace")
        after = self.text[self.peak :].decode("utf-8", "replace")
        return before, after[:1], after[1:]


class Units:
    """Cuts scored blocks of one text into units.

    Args:
      by: ``line``, ``word`` or ``token``.
      masks: names of `MASKS`.
      relative: subtract the average surprise of the earlier units of the same kind, which are those
        that differ in their words and numbers only. The average of all counts as one more of them.
    """

    def __init__(self, by: str, masks: Sequence[str] = (), relative: bool = False) -> None:
        self._by, self._relative = by, relative
        self._mask = re.compile(
            b"|".join(MASKS[name] for name in MASKS if name in masks) or rb"(?!)"
        )
        self._kinds: OrderedDict[bytes, tuple[int, float]] = OrderedDict()
        self._all = (0, 0.0)
        self._line, self._column = 1, 0

    def cut(self, block: ScoredBlock) -> Iterator[Unit]:
        """Yield the units of the next block."""
        text, starts = block.text, block.starts
        is_counted = np.ones(len(starts), np.bool_)
        for match in self._mask.finditer(text):
            first = np.searchsorted(starts, match.start(), "right") - 1
            is_counted[first : np.searchsorted(starts, match.end())] = False
        excess = block.excess * is_counted
        if self._by == "token":
            edges = [*starts.tolist(), len(text)]
        else:
            pattern = rb"\n" if self._by == "line" else rb"\S+|\n"
            edges = sorted({0, *(match.end() for match in re.finditer(pattern, text)), len(text)})
        tokens = np.searchsorted(starts, edges)
        total = np.concatenate([[0.0], np.cumsum(block.bits * is_counted, dtype=np.float64)])
        sums = np.diff(total[tokens]).tolist()
        spans = itertools.pairwise(zip(edges, tokens.tolist(), strict=True))
        for ((start, first), (end, last)), bits in zip(spans, sums, strict=True):
            whole, line, column = text[start:end], self._line, self._column
            is_end = whole.endswith(b"\n")
            self._line, self._column = (line + 1, 0) if is_end else (line, column + len(whole))
            if first == last or not whole.strip():
                continue
            peak = first + int(np.argmax(excess[first:last]))
            surprise = float(excess[peak])
            if self._relative:
                surprise -= self._expect(whole, surprise)
            while peak > first and text[starts[peak]] & 0xC0 == 0x80:  # inside a character
                peak -= 1
            at, place = int(starts[peak]) - start, block.before(peak)
            yield Unit(line, column, whole.rstrip(b"\r\n"), bits, surprise, at, place)

    def _expect(self, text: bytes, surprise: float) -> float:
        """Return the average surprise of the kind of a unit so far, and add this unit to it."""
        kind = re.sub(rb"[A-Za-z_\x80-\xff]+", b"a", re.sub(rb"[0-9a-fA-F]*\d\w*", b"0", text))
        count, total = self._kinds.pop(kind[:_KIND_BYTES], (0, 0.0))
        number, sum_of_all = self._all
        expected = (total + sum_of_all / max(number, 1)) / (count + 1)
        self._kinds[kind[:_KIND_BYTES]] = count + 1, total + surprise
        self._all = number + 1, sum_of_all + surprise
        if len(self._kinds) > _MAX_KINDS:
            self._kinds.popitem(last=False)
        return expected


class Threshold:
    """A quantile of the last 10,000 numbers of a stream."""

    def __init__(self, quantile: float) -> None:
        self._quantile, self._count = quantile, 0
        self._recent = np.zeros(_RECENT)

    def is_exceeded(self, number: float) -> bool:
        """Add a number; return True if it exceeds the quantile of those before.

        The first ``1 / (1 - quantile)`` numbers never do.
        """
        recent = self._recent[: self._count]
        is_first = self._count * (1 - self._quantile) < 1
        is_high = not is_first and number > np.quantile(recent, self._quantile)
        self._recent[self._count % _RECENT] = number
        self._count += 1
        return bool(is_high)


def read_blocks(read: Callable[[int], bytes], name: str) -> Iterator[str]:
    """Yield the text that `read` returns as it comes, in whole lines, or parts of long ones.

    Bytes that are not UTF-8 become U+FFFD. Raises `UserError` for a binary file, which has a zero
    among its first bytes.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    rest, is_first = "", True
    while data := read(BLOCK_BYTES):
        if is_first and b"\0" in data:
            raise UserError(f"{name}: a binary file; score text in UTF-8")
        rest, is_first = rest + decoder.decode(data), False
        end = rest.rfind("\n") + 1 or (len(rest) if len(rest) >= BLOCK_BYTES else 0)
        if end:
            yield rest[:end]
            rest = rest[end:]
    rest += decoder.decode(b"", final=True)
    if rest:
        yield rest


def colored(block: ScoredBlock) -> list[tuple[int, str]]:
    """Split the text of a block into parts of one color, from 0; lines have parts of their own."""
    data = np.frombuffer(block.text, np.uint8)
    of_tokens = np.searchsorted(LEVELS, block.excess, side="right")
    of_bytes = np.repeat(of_tokens, np.diff(block.starts, append=len(data)))
    begins = np.flatnonzero(data & 0xC0 != 0x80)
    of_characters = np.maximum.reduceat(of_bytes, begins)
    cuts = (data[begins] == ord("\n")) | (np.diff(of_characters, prepend=-1) != 0)
    spans = itertools.pairwise([*np.flatnonzero(cuts).tolist(), len(begins)])
    text = block.text.decode()
    return [(int(of_characters[start]), text[start:end]) for start, end in spans]


def render_page(
    name: str,
    model: str,
    texts: Mapping[str, list[tuple[int, str]]],
    rows: Iterable[tuple[str, Unit, str]],
) -> str:
    """Return an HTML page of `colored` texts; `rows` are the units to list, with expected texts."""
    template = page_template("simplernn_jax.analysis", "surprise.html")
    return template.render(name=name, model=model, levels=LEVELS, texts=texts, rows=list(rows))
