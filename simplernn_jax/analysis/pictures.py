"""What all pictures of a page share: one look, text that can be drawn, PNG bytes."""

import functools
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from simplernn_jax.analysis.token_text import Unit, visible

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


def drawable(text: str) -> str:
    """`text` on one line; a character that the pictures' font lacks is a box."""
    return "".join(c if ord(c) in _glyphs() else "□" for c in visible(text))


def label_text(axis: Any, units: Sequence[Unit], offset: int, most: int) -> None:
    """Writes a text along an axis whose unit is a token: about `most` ticks, each with what
    follows it.

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
        names.append(f"{drawable(text)[: max(step, 12)]} {offset + tick}")
    axis.set_ticks(list(ticks), names, **MONOSPACE)


@functools.cache
def _glyphs() -> frozenset[int]:
    from matplotlib import font_manager

    return frozenset(
        font_manager.get_font(font_manager.findfont(str(MONOSPACE["fontfamily"]))).get_charmap()
    )
