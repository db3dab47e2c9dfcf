"""What all pictures of a page share: one look, text that can be drawn, PNG bytes."""

import functools
import io
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from simplernn_jax.analysis.token_text import Unit, escaped, visible

_DPI = 110
_STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
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
    figure.savefig(buffer, format="png", dpi=_DPI)
    return buffer.getvalue()


def colors(count: int) -> list[Any]:
    """So many colours, from dark to light."""
    import matplotlib

    return list(matplotlib.colormaps["viridis"](np.linspace(0, 0.85, max(count, 1))))


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
    """Writes a text along an axis whose unit is a token: about `most` ticks, each with the
    beginning of what follows it.

    Args:
      axis: of an image whose cells are tokens.
      units: of the tokens shown.
      offset: position of the first of them in its document.
      most: ticks.
    """
    length = units[-1].stop
    step = -(-length // most)
    ticks = range(0, length, step)
    names = []
    for tick in ticks:
        text = "".join(unit.text for unit in units if tick <= unit.start < tick + step)
        names.append(f"{beginning(text, LABEL)} {offset + tick}")
    axis.set_ticks(list(ticks), names, **MONOSPACE)


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
