"""Pictures over the text: attention maps, the state's share, what a prediction was made of."""

from collections.abc import Mapping, Sequence

import numpy as np

from simplernn_jax.analysis.pictures import (
    FITTING,
    LABEL,
    MONOSPACE,
    beginning,
    ending,
    label_text,
    line_styles,
    new_figure,
    png,
    sparse_markers,
)
from simplernn_jax.analysis.token_text import Unit, begins_word

_COLUMNS = 2
_NEIGHBORS = 12
"""Units on each side of one that a label looks at for the rest of its word."""
_TICKS_PER_INCH = 3.2


def draw_maps(weights: np.ndarray, units: Sequence[Unit], offset: int, row: int) -> bytes:
    """Heat maps of one layer, one per head.

    Args:
      weights: ``[H, T, T]``.
      units: of the T tokens.
      offset: position of the first token in its document.
      row: marked with a line.
    """
    from matplotlib.colors import FuncNorm

    heads, length, _ = weights.shape
    columns = min(heads, _COLUMNS)
    rows = -(-heads // columns)
    above = np.triu(np.ones((length, length), bool), 1)
    side = float(np.clip(length / 40, 5, 12))  # inches of one map
    ticks = round(_TICKS_PER_INCH * side)
    with new_figure(2.4 + side * columns, 0.4 + (side + 1.1) * rows) as figure:
        grid = figure.subplots(rows, columns, squeeze=False)
        for head, axes in enumerate(grid.flat):
            if head >= heads:
                axes.set_axis_off()
                continue
            largest = float(np.abs(weights[head]).max())
            image = axes.imshow(
                np.ma.array(weights[head] / (largest or 1.0), mask=above),
                cmap="RdBu_r",
                # A root, so that a tenth is seen and a hundredth is faint.
                norm=FuncNorm((_signed_root, _signed_square), vmin=-1, vmax=1),
                interpolation="nearest",
            )
            axes.axhline(row, color="black", linewidth=0.7, linestyle=":")
            axes.set_title(f"head {head + 1}: largest |A| = {largest:.3g}")
            axes.set_xlabel("token j that is read")
            label_text(axes.xaxis, units, offset, ticks)
            axes.tick_params(axis="x", rotation=90)
            label_text(axes.yaxis, units, offset, ticks)
            axes.set_ylabel("output after token t")
        levels = [-1, -0.5, -0.1, -0.01, 0.01, 0.1, 0.5, 1]
        bar = figure.colorbar(image, ax=grid, location="top", shrink=0.5, aspect=40, ticks=levels)
        bar.set_ticks(levels, labels=[f"{level:.0%}" for level in levels])
        bar.minorticks_off()
        bar.set_label("weight A_tj, as a share of the largest |A| of its head")
        return png(figure)


def _signed_root(x: np.ndarray) -> np.ndarray:
    return np.sign(x) * np.sqrt(np.abs(x))


def _signed_square(x: np.ndarray) -> np.ndarray:
    return np.sign(x) * np.square(x)


def draw_state_share(shares: Mapping[str, np.ndarray], units: Sequence[Unit], offset: int) -> bytes:
    """How much of each output came from before the stretch of text.

    Args:
      shares: by the name of the layer, ``[T]``.
      units: of the T tokens.
      offset: position of the first of them in its document.
    """
    with new_figure(FITTING, 4) as figure:
        axes = figure.subplots()
        curves = zip(shares.items(), line_styles(len(shares)), strict=True)
        for index, ((name, share), style) in enumerate(curves):
            places = sparse_markers(len(share), index, len(shares))
            axes.plot(share, markevery=places, label=name, **style)
        label_text(axes.xaxis, units, offset, round(FITTING * _TICKS_PER_INCH))
        axes.tick_params(axis="x", rotation=90)
        axes.set_xlim(0, max(units[-1].stop - 1, 1))
        axes.set_ylim(bottom=0)
        axes.set(xlabel="output after token t", ylabel="norm, relative to the output's")
        axes.grid(axis="y")
        axes.legend(loc="upper right")
        return png(figure)


def draw_contributions(
    panels: Sequence[tuple[str, str, np.ndarray, float]], units: Sequence[Unit], most: int = 12
) -> bytes:
    """Bars for the tokens that gave most, the strongest first; red is for, blue against.

    Args:
      panels: title, unit of measure, contribution of each of `units` and that of everything
        before them, which is written below unless it is 0: it may be many times the others.
      units: of the tokens before the predicted one.
      most: bars of one panel.
    """
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    with new_figure(4.1 * columns, 0.3 + 3.4 * rows) as figure:
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes in grid.flat[len(panels) :]:
            axes.set_axis_off()
        for axes, (title, measure, values, before) in zip(grid.flat, panels, strict=False):
            bars = [(label_unit(units, index), value) for index, value in enumerate(values)]
            bars = sorted(bars, key=lambda bar: -abs(bar[1]))[:most]
            places = range(len(bars))
            reds = ["tab:red" if value > 0 else "tab:blue" for _, value in bars]
            axes.barh(places, [value for _, value in bars], color=reds)
            axes.set_yticks(places, [label for label, _ in bars], **MONOSPACE)
            axes.set_ylim(most - 0.5, -0.5)
            axes.axvline(0, color="black", linewidth=0.6)
            written = f"\nall before this stretch: {before:+.3g}" if before else ""
            axes.locator_params(axis="x", nbins=5)  # or long numbers touch
            axes.set(title=title, xlabel=measure + written)
            axes.grid(axis="x")
        return png(figure)


def label_unit(units: Sequence[Unit], index: int) -> str:
    """A unit between brackets in its word, or between two, and how far before the end it stands."""
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
