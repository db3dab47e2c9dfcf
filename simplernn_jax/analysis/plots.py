"""Plots of the memory and of the state's value, and the style that all plots share."""

import io
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from simplernn_jax.analysis.memory import Memory
from simplernn_jax.analysis.state_value import PositionLoss
from simplernn_jax.errors import counted
from simplernn_jax.training.evaluate import Evaluation

DPI = 130
"""Pixels per inch."""
FITTING = 5.8
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
_COLUMNS = 2
_MAX_NAMED = 8
"""Most curves in a legend; the others continue the order of colors."""
_LEGEND_ROW = 0.2
"""Height of a row of a legend in inches."""
_MIN_PREDICTIONS = 30
"""Fewest predictions of a point of the loss by position."""
_STATE_PICTURES = {
    "state_norm": (
        "norms",
        "norm of the state",
        "Norm of the state along the text",
        "Frobenius norm of each head's state: a curve that keeps rising is a state that still "
        "fills, a sudden fall is a text that made the head forget.",
    ),
    "state_rank": (
        "ranks",
        "effective rank",
        "Effective rank of the state along the text",
        "An effective rank of 8 means that a head's state holds about 8 independent directions "
        "(exp of the entropy of its singular values as shares of their sum, Roy and Vetterli "
        "2007); the largest possible is the smaller of its key and value channels.",
    ),
}
"""Field of `LayerMemory`, axis label, title and caption."""


class Plot(NamedTuple):
    """A PNG with the title and caption that a page shows beside it."""

    name: str
    """Name of its file, without the suffix."""
    title: str
    caption: str
    png: bytes


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
    figure.savefig(buffer, format="png", dpi=DPI)
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


def add_legend(figure: Any, axes: Any) -> None:
    """Put the legend of `axes` above the figure, where it covers no curve."""
    handles, labels = (part[:_MAX_NAMED] for part in axes.get_legend_handles_labels())
    longest = max(map(len, labels))
    columns = int(np.clip(FITTING / (0.085 * longest + 0.7), 1, 4))  # inches
    figure.set_figheight(figure.get_figheight() + _LEGEND_ROW * -(-len(labels) // columns))
    figure.legend(handles, labels, loc="outside upper center", ncols=columns, frameon=False)


def draw_half_lives(memory: Memory, window: int) -> Plot:
    """Draw the sorted half-lives of each layer, and the training window for comparison."""
    with new_figure(FITTING, 4) as figure:
        axes = figure.subplots()
        label = f"training window ({window:,})"
        axes.axhline(window, color="grey", linestyle="--", linewidth=1, label=label)
        key_channels = max(part.half_lives.size for part in memory.layers if part is not None)
        styles = line_styles(len(memory.layers), key_channels)
        for number, (part, style) in enumerate(zip(memory.layers, styles, strict=True), 1):
            if part is not None:
                lives = np.sort(part.half_lives.ravel())[::-1]
                lives = np.where(np.isfinite(lives), lives, np.nan)
                channels = np.arange(1, len(lives) + 1)
                axes.plot(channels, lives, label=f"layer {number}", **style)
        axes.set_yscale("log", subs=[2, 5])
        axes.yaxis.set_major_formatter("{x:,g}")
        axes.yaxis.set_minor_formatter("{x:,g}")
        axes.set(xlabel="key channels of all heads, by half-life", ylabel="half-life (tokens)")
        axes.grid(axis="y", which="both")
        add_legend(figure, axes)
        return Plot(
            "half_lives",
            "Half-life of every key channel, sorted",
            "A point at 100 means that this channel decays by half in 100 tokens, on average over "
            "this text (ln 2 / E[-log g]); a curve that stays high to the right is a layer with "
            "many long memories.",
            png(figure),
        )


def draw_state(memory: Memory, name: str) -> Plot:
    """Draw one panel per layer and one curve per head: ``state_norm`` or ``state_rank``."""
    field, label, title, caption = _STATE_PICTURES[name]
    layers = [(n, part) for n, part in enumerate(memory.layers, 1) if part is not None]
    columns = min(len(layers), _COLUMNS)
    rows = -(-len(layers) // columns)
    with new_figure(FITTING, 0.2 + 2.3 * rows) as figure:
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        for axes in grid.flat[len(layers) :]:
            axes.set_axis_off()
        for axes, (number, part) in zip(grid.flat, layers, strict=False):
            values = getattr(part, field)
            points, heads = values.shape
            for head, style in enumerate(line_styles(heads, points)):
                axes.plot(memory.positions, values[:, head], label=f"head {head + 1}", **style)
            axes.set(title=f"layer {number}", xlabel="tokens read")
            axes.grid(axis="y")
        grid[0, 0].set_ylim(bottom=0)
        for axes in grid[:, 0]:
            axes.set_ylabel(label)
        add_legend(figure, grid[0, 0])
        return Plot(name, title, caption, png(figure))


def draw_position_loss(loss: PositionLoss, window: int) -> Plot:
    """Draw the loss by position in the document, carried and reset every `window` tokens."""
    drawn = loss.counts >= min(_MIN_PREDICTIONS, loss.counts.max())
    middles = loss.starts[drawn] * 2**0.5
    reset = f"state reset every {counted(window, 'token')} (training window)"
    with new_figure(FITTING, 4) as figure:
        axes = figure.subplots()
        axes.errorbar(
            middles,
            loss.carried[drawn],
            2 * loss.errors[drawn],
            color="tab:blue",
            marker="o",
            capsize=3,
            label="state carried over the document",
        )
        axes.errorbar(
            middles * 1.05,  # beside the other's bars, not over them
            loss.reset[drawn],
            2 * loss.reset_errors[drawn],
            color="tab:orange",
            marker="s",
            markersize=8,
            markerfacecolor="none",
            linestyle="--",
            capsize=5,
            label=reset,
        )
        _set_loss_axes(axes, middles, "tokens of the document before the prediction")
        add_legend(figure, axes)
        return Plot(
            "loss_by_position",
            "Loss by position in the document",
            "A blue curve that falls to the right means better predictions with more of the "
            "document read (bars: two standard errors; a point is a range of positions, each twice "
            "as long as the one before). Orange above blue is the gain from the state carried over "
            "the last reset; where orange is below blue, the model predicts better without it.",
            png(figure),
        )


def draw_reset_loss(losses: dict[int, Evaluation], window: int) -> Plot:
    """Draw the loss by reset interval; interval 0, never reset, is a horizontal line."""
    intervals = sorted(interval for interval in losses if interval)
    with new_figure(FITTING, 4) as figure:
        axes = figure.subplots()
        values = [losses[interval].nats_per_token for interval in intervals]
        axes.plot(intervals, values, color="tab:orange", marker="s", label="state reset")
        axes.axhline(losses[0].nats_per_token, color="tab:blue", label="state carried, never reset")
        axes.plot(
            [window],
            [losses[window].nats_per_token],
            color="tab:red",
            marker="D",
            linestyle="",
            markersize=12,
            markerfacecolor="none",
            label=f"reset at every training window ({counted(window, 'token')})",
        )
        _set_loss_axes(axes, intervals, "tokens between two resets")
        add_legend(figure, axes)
        return Plot(
            "loss_by_reset",
            "Loss by reset interval of the state",
            "Orange above blue: tokens further back than the interval still help. Where the two "
            "meet, they add nothing; where orange is below blue, the model predicts better once "
            "they are forgotten.",
            png(figure),
        )


def _set_loss_axes(axes: Any, places: Sequence[float] | np.ndarray, label: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xlim(0.75 * places[0], 1.5 * places[-1])  # also if every loss is NaN
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.minorticks_off()
    axes.set(xlabel=label, ylabel="loss (nats per token)")
    axes.grid(axis="y")
