"""Plots of an explanation: maps, contributions, memory and state; and the style that all share."""

import io
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from simplernn_jax.analysis.explanation import Explanation
from simplernn_jax.analysis.memory import Memory
from simplernn_jax.analysis.state_value import PositionLoss
from simplernn_jax.analysis.token_text import MONOSPACE, Unit, label_text, label_unit, sum_by_unit
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
_TICKS_PER_INCH = 3.2
_COLOR_LEVELS = [-1, -0.3, -0.1, 0, 0.1, 0.3, 1]
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
    """A PNG with its title and caption."""

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


def add_legend(figure: Any, axes: Any, most: int = _MAX_NAMED) -> None:
    """Put the legend of the first `most` curves above the figure, where it covers none."""
    handles, labels = (part[:most] for part in axes.get_legend_handles_labels())
    longest = max(map(len, labels))
    columns = int(np.clip(figure.get_figwidth() / (0.085 * longest + 0.7), 1, 4))  # inches
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
            middles * 1.05,  # next to the other's bars, not over them
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


def draw_map(explanation: Explanation, layer: int) -> Plot:
    """Draw the attention map of one layer, from 0, with the chosen prediction marked."""
    weights = np.asarray(explanation.layers[layer].weights[0])
    position = explanation.chosen.position - 1 - explanation.start
    return Plot(
        f"map_layer_{layer + 1}",
        f"Attention map of {explanation.layer_names[layer]}",
        "Each row is one output and each column an earlier token, labeled with the text that "
        "begins there: red adds that token's value, blue (in a recurrence only) subtracts it, "
        "white leaves it out; full color is the largest weight of the head, given in its title, "
        "and a hundredth of that is faint. The dotted line is the output that predicts the chosen "
        "token.",
        draw_heads(weights, explanation.units, explanation.start, position),
    )


def draw_heads(weights: np.ndarray, units: Sequence[Unit], offset: int, position: int) -> bytes:
    """Draw ``[H, T, T]`` weights of one layer as heat maps, one per head.

    `offset` is the position of the first token in its document, `position` the marked output.
    """
    from matplotlib.colors import AsinhNorm

    heads, length, _ = weights.shape
    columns = min(heads, _COLUMNS)
    rows = -(-heads // columns)
    above = np.triu(np.ones((length, length), bool), 1)
    side = float(np.clip(length / 40, 5, 12))  # inches of one map
    ticks = round(_TICKS_PER_INCH * side)
    with new_figure(2.4 + side * columns, 0.4 + (side + 1.1) * rows) as figure:
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes in grid.flat[heads:]:
            axes.set_axis_off()
        for head, axes in enumerate(grid.flat[:heads]):
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
            label_text(axes.xaxis, units, offset, ticks)
            axes.tick_params(axis="x", rotation=90)
            label_text(axes.yaxis, units, offset, ticks)
        bar = figure.colorbar(image, ax=grid, location="top", shrink=0.5, aspect=40)
        bar.set_ticks(_COLOR_LEVELS, labels=[f"{level:.0%}" for level in _COLOR_LEVELS])
        bar.minorticks_off()
        bar.set_label("weight A_tj, as a share of the largest |A| of its head")
        return png(figure)


def draw_state_share(explanation: Explanation) -> Plot:
    """Draw the part of each layer's outputs that the state before the maps gives."""
    units = explanation.units
    with new_figure(FITTING, 4) as figure:
        axes = figure.subplots()
        styles = line_styles(len(explanation.layers), units[-1].stop)
        named = zip(explanation.layer_names, explanation.layers, styles, strict=True)
        for name, layer, style in named:
            part = np.linalg.norm(layer.from_state[0], axis=(-2, -1))
            whole = np.linalg.norm(layer.output[0], axis=(-2, -1))
            axes.plot(part / np.maximum(whole, np.finfo(np.float32).tiny), label=name, **style)
        label_text(axes.xaxis, units, explanation.start, round(FITTING * _TICKS_PER_INCH))
        axes.tick_params(axis="x", rotation=90)
        axes.set_xlim(0, max(units[-1].stop - 1, 1))
        axes.set_ylim(bottom=0)
        axes.set(xlabel="output after token t", ylabel="norm, relative to the output's")
        axes.grid(axis="y")
        add_legend(figure, axes)
        return Plot(
            "state_share",
            "Contribution of the text before the maps",
            "Norm of the part of each output that the state before the first token of the maps "
            "gives (in attention, its cache), relative to that of the whole output: 0 means that "
            "the map alone explains all of it.",
            png(figure),
        )


def draw_contributions(explanation: Explanation) -> Plot:
    """Draw the strongest contributions to the chosen prediction, by gradient and by layer."""
    chosen = explanation.chosen
    by_gradient = sum_by_unit(chosen.units, chosen.from_all.tokens)
    panels = [
        (
            "all layers, by gradient",
            "gradient times input (nats)",
            by_gradient,
            chosen.from_all.state,
        )
    ]
    for layer, name in enumerate(explanation.layer_names):
        shares, state = contributions_by_unit(explanation, layer), chosen.by_layer[layer].state
        panels.append((f"{name}, by its map", "share of the output", shares, state))
    return Plot(
        "contributions",
        "The tokens that contributed most to the chosen prediction",
        "Each bar is one earlier token, in brackets in its word, with its distance to the "
        "predicted one: red supports the prediction (in a layer: its output), blue opposes it.",
        draw_bars(panels, chosen.units),
    )


def contributions_by_unit(explanation: Explanation, layer: int) -> np.ndarray:
    """Return [units]: a layer's shares of the units before the chosen token."""
    chosen = explanation.chosen
    shares = chosen.by_layer[layer].tokens[: chosen.position - explanation.start]
    return sum_by_unit(chosen.units, shares)


def draw_bars(
    panels: Sequence[tuple[str, str, np.ndarray, float]], units: Sequence[Unit], most: int = 12
) -> bytes:
    """Draw the strongest contributions as bars, red for and blue against.

    Args:
      panels: title, unit of measure, contribution of each of `units` and of all text before,
        which is written below unless it is 0: it may be far larger than the others.
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
            strongest = np.argsort(-np.abs(values), kind="stable")[:most]
            bars = np.arange(len(strongest))
            reds = np.where(values[strongest] > 0, "tab:red", "tab:blue")
            axes.barh(bars, values[strongest], color=reds)
            axes.set_yticks(
                bars, [label_unit(units, index) for index in strongest.tolist()], **MONOSPACE
            )
            axes.set_ylim(most - 0.5, -0.5)
            axes.axvline(0, color="black", linewidth=0.6)
            axes.locator_params(axis="x", nbins=5)  # or long numbers touch
            note = f"\nall text before this excerpt: {before:+.3g}" if before else ""
            axes.set_title(title)
            # Below the labels too, since a long note does not fit below the bars.
            axes.set_xlabel(measure + note, loc="right")
            axes.grid(axis="x")
        return png(figure)
