"""The surprising lines, words or tokens of a text, from the bits of its tokens.

A unit is ranked by the sum of squares of the bits that its tokens have beyond those that the model
expected: random digits, which the model knows to be random, count little, and one wrong character
counts more than many slightly unusual ones.
"""

import heapq
import html
import io
import itertools
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jinja2
import numpy as np

from simplernn_jax.errors import UserError
from simplernn_jax.inference.scoring import ScoredBlock

BLOCK_BYTES = 1 << 14
"""Bytes of text that are scored at a time, and of a line that are one unit; a longer line has
several."""
_MAX_KINDS = 1 << 12
"""Kinds of lines whose average is remembered."""

_CLOCK = rb"\d{1,2}:\d\d(?::\d\d(?:[.,]\d+)?)?(?:Z|[+-]\d\d:?\d\d)?"
MASKS = {
    "digits": rb"\d+",
    "hex": rb"\b(?:0x)?(?=[0-9a-fA-F]*\d)[0-9a-fA-F]{6,}\b",
    "uuid": rb"\b[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}\b",
    "time": rb"\b\d{4}[-/]\d\d[-/]\d\d(?:[T ]" + _CLOCK + rb")?|\b" + _CLOCK,
}
"""Patterns of fields that vary, whose bits are not counted."""


class Unit(NamedTuple):
    """A line, a word or a token of a text."""

    line: int
    """Number of its line, from 1."""
    column: int
    """Bytes of its line before it."""
    text: bytes
    """Without the end of the line."""
    bits: float
    surprise: float
    """What units are ranked by; see above."""
    peak: int
    """Position in `text` of its most surprising token."""
    peak_token: int
    """Index in `block` of that token."""
    block: ScoredBlock

    def around_peak(self) -> tuple[str, str, str]:
        """Return the text before its most surprising character, that character, and the rest."""
        before, after = (
            part.decode("utf-8", "replace")
            for part in (self.text[: self.peak], self.text[self.peak :])
        )
        return before, after[:1], after[1:]


class Units:
    """Cuts scored blocks of one text into units.

    Args:
      by: ``line``, ``word`` or ``token``.
      masks: names of `MASKS`.
      relative: subtract the average surprise of the earlier lines of the same kind, which are those
        that differ in their words and numbers only.
    """

    def __init__(self, by: str, masks: tuple[str, ...] = (), relative: bool = False) -> None:
        self._by, self._relative = by, relative
        self._mask = re.compile(b"|".join(MASKS[name] for name in masks)) if masks else None
        self._kinds: OrderedDict[bytes, tuple[int, float]] = OrderedDict()
        self._line, self._column = 1, 0

    def cut(self, block: ScoredBlock) -> Iterator[Unit]:
        """Yield the units of a block, which ends with a line or a part of one."""
        bits = np.array(block.scores.bits, np.float64)
        excess = np.maximum(bits - block.scores.expected, 0)
        if self._mask is not None:
            is_masked = np.zeros(len(block.text) + 1, np.bool_)
            for match in self._mask.finditer(block.text):
                is_masked[match.start() : match.end()] = True
            bits[is_masked[block.starts]] = excess[is_masked[block.starts]] = 0
        for start, end in self._spans(block):
            first, last = np.searchsorted(block.starts, (start, end))
            text = block.text[start:end]
            line, column = self._line, self._column
            ends_line = text.endswith(b"\n")
            self._line, self._column = (line + 1, 0) if ends_line else (line, column + len(text))
            if first == last or not text.strip():
                continue
            peak = first + int(np.argmax(excess[first:last]))
            surprise = float(np.sum(np.square(excess[first:last])))
            if self._relative:
                surprise -= self._expect(text, surprise)
            at = int(block.starts[peak]) - start
            total = float(np.sum(bits[first:last]))
            yield Unit(line, column, text.rstrip(b"\r\n"), total, surprise, at, peak, block)

    def _spans(self, block: ScoredBlock) -> Iterator[tuple[int, int]]:
        if self._by == "token":
            edges = [*block.starts.tolist(), len(block.text)]
        else:
            pattern = rb"\n" if self._by == "line" else rb"\S+|\n"
            edges = [0, *(match.end() for match in re.finditer(pattern, block.text))]
            edges += [len(block.text)] if edges[-1] < len(block.text) else []
        return itertools.pairwise(edges)

    def _expect(self, text: bytes, surprise: float) -> float:
        """Return the average surprise of the kind of a line so far, and add this line to it."""
        kind = re.sub(rb"[A-Za-z_\x80-\xff]+", b"a", re.sub(rb"[0-9a-fA-F]*\d\w*", b"0", text))
        count, mean = self._kinds.pop(kind, (0, 0.0))
        self._kinds[kind] = count + 1, mean + (surprise - mean) / (count + 1)
        if len(self._kinds) > _MAX_KINDS:
            self._kinds.popitem(last=False)
        return mean


class Top:
    """The most surprising units of all that were added."""

    def __init__(self, size: int) -> None:
        self._size, self._added = size, 0
        self._heap: list[tuple[float, int, str, Unit]] = []

    def add(self, name: str, unit: Unit) -> None:
        """Add a unit of the text `name`."""
        self._added += 1
        entry = unit.surprise, -self._added, name, unit
        if len(self._heap) < self._size:
            heapq.heappush(self._heap, entry)
        elif self._size:
            heapq.heappushpop(self._heap, entry)

    def units(self) -> list[tuple[str, Unit]]:
        """List the names and units, the most surprising first."""
        return [(name, unit) for _, _, name, unit in sorted(self._heap, reverse=True)]


def read_blocks(read: Callable[[int], bytes], name: str) -> Iterator[str]:
    """Yield the text that `read` returns as it comes, in whole lines, or parts of long ones.

    Bytes that are not UTF-8 become U+FFFD. Raises `UserError` for a binary file.
    """
    rest = b""
    while new := read(BLOCK_BYTES):
        if b"\0" in new:
            raise UserError(f"{name}: a binary file; score text")
        rest += new
        end = rest.rfind(b"\n") + 1
        if not end and len(rest) >= BLOCK_BYTES:
            end = len(rest)
            while end > 1 and rest[end - 1] & 0xC0 == 0x80:  # the last character may be unfinished
                end -= 1
            end -= 1
        if end:
            yield rest[:end].decode("utf-8", "replace")
            rest = rest[end:]
    if rest:
        yield rest.decode("utf-8", "replace")


class Page:
    """An HTML page of texts, colored by the bits of their tokens beyond the expected ones."""

    levels = (1, 2, 4, 6, 9, 13)
    """Bits from which each color is used."""
    max_bytes = 1 << 22
    """Bytes of all texts that are shown."""

    def __init__(self) -> None:
        self._body, self._left = io.StringIO(), self.max_bytes

    def begin(self, name: str) -> None:
        """Begin the text `name`."""
        self._name, self._line = name, 1
        title = html.escape(name)
        self._body.write(f'<h2>{title}</h2>\n<pre><a id="{title}:1"></a>')

    def add(self, block: ScoredBlock) -> None:
        """Add the next block of the text."""
        text = block.text[: self._left]
        self._left -= len(text)
        excess = np.maximum(block.scores.bits - block.scores.expected, 0)
        level = np.searchsorted(self.levels, excess, side="right")
        level = np.repeat(level, np.diff(block.starts, append=len(block.text)))[: len(text)]
        data = np.frombuffer(text, np.uint8)
        begins = (data == ord("\n")) | (np.diff(level, prepend=-1) != 0)
        edges = [*np.flatnonzero(begins & (data & 0xC0 != 0x80)).tolist(), len(text)]
        for start, end in itertools.pairwise(edges):
            if text[start:end].startswith(b"\n"):
                self._line += 1
                self._body.write(f'\n<a id="{html.escape(self._name)}:{self._line}"></a>')
                start += 1
            shown = html.escape(text[start:end].decode("utf-8", "replace"))
            if shown and level[start]:
                shown = f'<span class="s{level[start]}">{shown}</span>'
            self._body.write(shown)

    def end(self) -> None:
        """End the text."""
        self._body.write("</pre>\n" if self._left else "</pre>\n<p>The rest is not shown.</p>\n")

    def render(self, name: str, model: str, rows: Iterable[tuple[str, Unit, str]]) -> str:
        """Return the HTML of the page; `rows` are the names, units and expected texts to list."""
        environment = jinja2.Environment(
            loader=jinja2.PackageLoader("simplernn_jax.analysis", ""), autoescape=True
        )
        return environment.get_template("surprise.html").render(
            name=name,
            model=model,
            levels=self.levels,
            rows=[(name, unit, *unit.around_peak(), expected) for name, unit, expected in rows],
            body=self._body.getvalue(),
        )
