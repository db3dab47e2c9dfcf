"""Plots of an explanation as PNG files, and the style that all share."""

import io
import itertools
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from simplernn_jax.analysis.decomposition import Contributions, LayerDecomposition
from simplernn_jax.analysis.explanation import Unit
from simplernn_jax.analysis.memory import PositionLoss
from simplernn_jax.errors import counted

_DPI = 130
_WIDTH = 5.8
"""Width in inches of a plot that is readable on a screen of 400 pixels."""
_STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.grid": False,
    "grid.alpha": 0.3,
    "text.parse_math": False,  # a dollar sign in a text is a dollar sign
    "axes.spines.top": False,
    "axes.spines.right": False,
}
_MONOSPACE = {"fontfamily": "DejaVu Sans Mono", "fontsize": 8}
"""Style of quotations; the font comes with matplotlib."""
_LABEL = 12
"""Most characters of a quotation."""
_MAX_NAMED = 8
"""Most curves in a legend; the others continue the order of colors."""
_LEGEND_ROW = 0.2
"""Height of a row of a legend in inches."""
_MIN_PREDICTIONS = 30
"""Fewest predictions of a point of the loss by position."""
_TICKS_PER_INCH = 3.2
_COLOR_LEVELS = [-1, -0.3, -0.1, 0, 0.1, 0.3, 1]

_VISIBLE = str.maketrans({"\n": "⏎", "\t": "⇥", " ": "·", "\r": "␍"})


@contextmanager
def new_figure(width: float, height: float) -> Iterator[Any]:
    """Create a matplotlib figure, in inches, to be drawn and saved inside the context."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure


def png(figure: Any) -> bytes:
    """Return the figure as a PNG file."""
    buffer = io.BytesIO()
    with warnings.catch_warnings(action="ignore"):  # of glyphs that the font lacks: it has a box
        figure.savefig(buffer, format="png", dpi=_DPI)
    return buffer.getvalue()


def line_styles(count: int, points: int) -> list[dict[str, Any]]:
    """Return arguments of ``plot`` for `count` curves that stay distinct where they meet.

    Each has its color, dash pattern and open marker, and its own places of about eight markers.
    """
    import matplotlib

    step = max(points // 8, 1)
    colors = matplotlib.colormaps["viridis"](np.linspace(0, 0.85, count))  # from dark to light
    shapes = zip(itertools.cycle("os^Dv*P"), itertools.cycle(("-", "--", "-.", ":")), strict=False)
    return [
        {
            "color": color,
            "linestyle": line,
            "linewidth": 1.2,
            "marker": marker,
            "markerfacecolor": "none",
            "markersize": 5,
            "markevery": (index * step // count, step),
        }
        for index, (color, (marker, line)) in enumerate(zip(colors, shapes, strict=False))
    ]


def add_legend(figure: Any, axes: Any, most: int = _MAX_NAMED) -> None:
    """Put the legend of the first `most` curves above the figure, where it covers none."""
    handles, labels = (part[:most] for part in axes.get_legend_handles_labels())
    longest = max(map(len, labels))
    columns = int(np.clip(figure.get_figwidth() / (0.085 * longest + 0.7), 1, 4))  # inches
    figure.set_figheight(figure.get_figheight() + _LEGEND_ROW * -(-len(labels) // columns))
    figure.legend(handles, labels, loc="outside upper center", ncols=columns, frameon=False)


@contextmanager
def _panels(count: int, columns: int, width: float, height: float) -> Iterator[tuple[Any, Any]]:
    """Create a figure of `count` axes in rows of at most `columns`, each of this size."""
    columns = min(count, columns)
    rows = -(-count // columns)
    with new_figure(width * columns, 0.4 + height * rows) as figure:
        grid = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes in grid[count:]:
            axes.set_axis_off()
        yield figure, grid[:count]


def draw_half_lives(layers: Sequence[np.ndarray | None], window: int) -> bytes:
    """Draw the sorted half-lives of each layer, and the training window for comparison."""
    with new_figure(_WIDTH, 4) as figure:
        axes = figure.subplots()
        label = f"training window ({window:,})"
        axes.axhline(window, color="grey", linestyle="--", linewidth=1, label=label)
        styles = line_styles(len(layers), max(x.size for x in layers if x is not None))
        for number, (layer, style) in enumerate(zip(layers, styles, strict=True), 1):
            if layer is not None:
                lives = np.sort(layer.ravel())[::-1]
                lives = np.where(np.isfinite(lives), lives, np.nan)
                axes.plot(np.arange(1, len(lives) + 1), lives, label=f"layer {number}", **style)
        axes.set_yscale("log", subs=[2, 5])
        axes.yaxis.set_major_formatter("{x:,g}")
        axes.yaxis.set_minor_formatter("{x:,g}")
        axes.set(xlabel="key channels of all heads, by half-life", ylabel="half-life (tokens)")
        axes.grid(axis="y", which="both")
        add_legend(figure, axes)
        return png(figure)


def draw_position_loss(loss: PositionLoss, window: int) -> bytes:
    """Draw the loss by position in the document, carried and reset every `window` tokens."""
    drawn = loss.counts >= min(_MIN_PREDICTIONS, loss.counts.max())
    middles = loss.starts[drawn] * 2**0.5
    reset = f"state reset every {counted(window, 'token')} (training window)"
    with new_figure(_WIDTH, 4) as figure:
        axes = figure.subplots()
        axes.plot(middles, loss.carried[drawn], "o-", label="state carried over the document")
        axes.plot(middles, loss.reset[drawn], "s--", markerfacecolor="none", label=reset)
        axes.set_xscale("log", base=2)
        axes.set_xlim(0.75 * middles[0], 1.5 * middles[-1])  # also if every loss is NaN
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.xaxis.minorticks_off()
        axes.set_xlabel("tokens of the document before the prediction")
        axes.set_ylabel("loss (nats per token)")
        axes.grid(axis="y")
        add_legend(figure, axes)
        return png(figure)


def draw_map(layer: LayerDecomposition, units: Sequence[Unit], offset: int, position: int) -> bytes:
    """Draw the attention map of one layer as heat maps, one per head.

    `offset` is the position of the first token in its document, `position` the marked output,
    counted from `offset`.
    """
    from matplotlib.colors import AsinhNorm

    weights = np.asarray(layer.weights[0])
    heads, length, _ = weights.shape
    above = np.triu(np.ones((length, length), bool), 1)
    side = float(np.clip(length / 40, 5, 12))  # inches of one map
    with _panels(heads, 2, side + 1.2, side + 1.1) as (figure, grid):
        for head, axes in enumerate(grid):
            largest = float(np.abs(weights[head]).max())
            image = axes.imshow(
                np.ma.array(weights[head] / (largest or 1.0), mask=above),
                cmap="RdBu_r",
                # A tenth is clearly visible and a hundredth is faint.
                norm=AsinhNorm(linear_width=0.05, vmin=-1, vmax=1),
                interpolation="nearest",
            )
            axes.axhline(position, color="black", linewidth=0.7, linestyle=":")
            axes.set(title=f"head {head + 1}: largest |A| = {largest:.3g}")
            axes.set(xlabel="earlier token j", ylabel="output after token t")
            for axis in (axes.xaxis, axes.yaxis):
                _label_tokens(axis, units, offset, round(_TICKS_PER_INCH * side))
            axes.tick_params(axis="x", rotation=90)
        bar = figure.colorbar(image, ax=list(grid), location="top", shrink=0.5, aspect=40)
        bar.set_ticks(_COLOR_LEVELS, labels=[f"{level:.0%}" for level in _COLOR_LEVELS])
        bar.minorticks_off()
        bar.set_label("weight A_tj, as a share of the largest |A| of its head")
        return png(figure)


def draw_contributions(
    panels: Sequence[tuple[str, str, Contributions]], units: Sequence[Unit], most: int = 12
) -> bytes:
    """Draw the strongest contributions as bars, red for and blue against.

    Args:
      panels: title, unit of measure, and contributions. That of all text before the units is
        written below unless it is 0: it may be far larger than the others.
      units: of the tokens before the predicted one.
      most: bars of one panel.
    """
    with _panels(len(panels), 3, 4.1, 3.4) as (figure, grid):
        for axes, (title, measure, part) in zip(grid, panels, strict=True):
            values, before = sum_by_unit(units, part.tokens), part.state
            strongest = np.argsort(-np.abs(values), kind="stable")[:most]
            bars = np.arange(len(strongest))
            reds = np.where(values[strongest] > 0, "tab:red", "tab:blue")
            axes.barh(bars, values[strongest], color=reds)
            labels = [_label_unit(units, index) for index in strongest.tolist()]
            axes.set_yticks(bars, labels, **_MONOSPACE)
            axes.set_ylim(most - 0.5, -0.5)
            axes.axvline(0, color="black", linewidth=0.6)
            axes.locator_params(axis="x", nbins=5)  # or long numbers touch
            axes.set_title(title)
            note = f"\nall text before this excerpt: {before:+.3g}" if before else ""
            axes.set_xlabel(measure + note, loc="right")
            axes.grid(axis="x")
        return png(figure)


def sum_by_unit(units: Sequence[Unit], values: np.ndarray) -> np.ndarray:
    """Return [units]: the sum of the [n] `values` over each unit's tokens."""
    return np.add.reduceat(values, [unit.start for unit in units])


def visible(text: str) -> str:
    """Return `text` on one line, with a visible character in place of each invisible one."""
    shown = text.translate(_VISIBLE)
    return "".join(c if c.isprintable() else "\ufffd" for c in shown)


def _label_tokens(axis: Any, units: Sequence[Unit], offset: int, most: int) -> None:
    """Label an axis of tokens with at most `most` ticks, at the beginnings of words if any."""
    begins = [
        bool(unit.text.strip()) and (unit.text[0].isspace() or before.text[-1].isspace())
        for before, unit in itertools.pairwise(units)
    ]
    places = [0, *(np.flatnonzero(begins) + 1).tolist()]
    if len(places) <= most // 2:  # some languages have no spaces
        places = list(range(len(units)))
    step = -(-units[-1].stop // most)
    ticks: list[int] = []
    names = []
    for place in places:
        start = units[place].start
        if not ticks or start - ticks[-1] >= step:
            text = "".join(unit.text for unit in units[place : place + _LABEL])
            ticks.append(start)
            names.append(f"{visible(text.strip()[:_LABEL])} {offset + start}")
    axis.set_ticks(ticks, names, **_MONOSPACE)


def _label_unit(units: Sequence[Unit], index: int) -> str:
    """Return a unit in brackets between its neighbors, and its distance to the end."""
    before = "".join(unit.text for unit in units[max(0, index - 8) : index])[-8:]
    after = "".join(unit.text for unit in units[index + 1 : index + 7])[:6]
    text = f"{visible(before)}[{visible(units[index].text[:_LABEL])}]{visible(after)}"
    return f"{text} {units[-1].stop - units[index].start:>4}"
