"""What all pictures of a page share: one look, text that can be drawn, PNG bytes."""

import functools
import io
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from simplernn_jax.analysis.token_text import Unit, begins_word, escaped, visible

DPI = 130
"""Pixels of an inch."""
_STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.grid": False,
    "grid.alpha": 0.3,
    "text.parse_math": False,  # a dollar sign in a text is a dollar sign
    "axes.spines.top": False,
    "axes.spines.right": False,
}
MONOSPACE = {"fontfamily": "DejaVu Sans Mono", "fontsize": 8}
"""For what is quoted from a text; the font comes with matplotlib."""
LABEL = 12
"""Characters of a quotation at most."""
FITTING = 5.8
"""Inches of a picture that can still be read on a screen of 400 pixels."""


@contextmanager
def new_figure(width: float, height: float) -> Iterator[Any]:
    """A matplotlib figure of so many inches, to be drawn and saved inside the context."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure


def png(figure: Any) -> bytes:
    """The picture as a file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def colors(count: int) -> list[Any]:
    """So many colours, from dark to light."""
    import matplotlib

    return list(matplotlib.colormaps["viridis"](np.linspace(0, 0.85, max(count, 1))))


def line_styles(count: int) -> list[dict[str, Any]]:
    """Arguments of ``plot`` for so many curves that stay apart where they meet: a color, a dash
    pattern and an open marker each."""
    shapes = zip(itertools.cycle("os^Dv*P"), itertools.cycle(("-", "--", "-.", ":")), strict=False)
    return [
        {
            "color": color,
            "linestyle": line,
            "marker": marker,
            "markerfacecolor": "none",
            "markersize": 5,
            "linewidth": 1.2,
        }
        for color, (marker, line) in zip(colors(count), shapes, strict=False)
    ]


def sparse_markers(points: int, index: int, count: int) -> tuple[int, int]:
    """``markevery`` of curve `index` of `count`: about eight markers, at places of its own."""
    step = max(points // 8, 1)
    return index * step // max(count, 1), step


def beginning(text: str, most: int) -> str:
    """So many characters of a picture for the beginning of `text`, the last an ellipsis if it goes
    on; a character that the font lacks is its escape, whole or left out."""
    drawn = list(map(_drawn, text))
    if sum(map(len, drawn)) <= most:
        return "".join(drawn)
    return "".join(_that_fit(drawn, most - 1)) + "…"


def ending(text: str, most: int) -> str:
    """The same for the end of `text`, without an ellipsis."""
    return "".join(reversed(_that_fit(list(map(_drawn, reversed(text))), most)))


def label_text(axis: Any, units: Sequence[Unit], offset: int, most: int) -> None:
    """Writes a text along an axis whose unit is a token: about `most` ticks, each at the beginning
    of a word where there is one, with the whole words that follow it.

    Args:
      axis: of an image whose cells are tokens.
      units: of the tokens shown.
      offset: position of the first of them in its document.
      most: ticks.
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
    """The whole words from unit `first` on that begin within so many tokens and fit a label; a
    first word that does not fit is cut, and ends in an ellipsis."""
    end = units[first].start + tokens
    shown = ""
    for stop in range(first + 1, len(units)):
        if begins_word(units, stop) or units[stop].text.isspace():
            text = "".join(unit.text for unit in units[first:stop]).strip()
            if shown and (len("".join(map(_drawn, text))) > LABEL or units[stop - 1].start >= end):
                break
            shown = text
    return beginning(shown or "".join(unit.text for unit in units[first:]).strip(), LABEL)


def _that_fit(drawn: Sequence[str], most: int) -> Sequence[str]:
    """The first of `drawn` that have at most so many characters together."""
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
