"""Pictures of the memory: half-lives, the state along the text, and what it is worth."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from simplernn_jax.analysis.memory import Memory
from simplernn_jax.analysis.pictures import (
    FITTING,
    line_styles,
    new_figure,
    png,
    sparse_markers,
)
from simplernn_jax.analysis.state_value import PositionLoss
from simplernn_jax.errors import counted
from simplernn_jax.training.evaluate import Evaluation

_COLUMNS = 2
_MOST_NAMED = 8
"""Heads that the legend names; the others follow in the order of colors."""

_FEWEST = 30
"""Predictions that a point of the loss by position needs to be drawn."""


def draw_half_lives(memory: Memory, window: int) -> bytes:
    """Sorted half-lives, one line per layer; `window` is drawn for comparison."""
    from matplotlib.ticker import LogLocator, NullFormatter

    with new_figure(FITTING, 4) as figure:
        axes = figure.subplots()
        count = len(memory.layers)
        for layer, (part, style) in enumerate(zip(memory.layers, line_styles(count), strict=True)):
            if part is not None:
                ordered = np.sort(part.half_lives.ravel())[::-1]
                axes.plot(
                    np.arange(1, len(ordered) + 1),
                    np.where(np.isfinite(ordered), ordered, np.nan),
                    markevery=sparse_markers(len(ordered), layer, count),
                    label=f"layer {layer + 1}",
                    **style,
                )
        axes.axhline(window, color="grey", linestyle="--", linewidth=1)
        axes.text(
            *(0.99, window, f"training window, {counted(window, 'token')}"),
            ha="right",
            va="bottom",
            transform=axes.get_yaxis_transform(),
            color="grey",
        )
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(_plain)
        axes.yaxis.set_minor_formatter(NullFormatter())
        channels = max(part.half_lives.size for part in memory.layers if part is not None)
        axes.set_xticks([1, *(tick for tick in axes.get_xticks() if 1 < tick <= channels)])
        axes.set_xlim(0.5, channels + 0.5)
        axes.set(xlabel="key channels of all heads, longest memory first")
        axes.set_ylabel("half-life (tokens)")
        axes.grid(axis="y")
        axes.legend(loc="upper right")
        return png(figure)


def draw_state(memory: Memory, name: str) -> bytes:
    """One panel per layer and one line per head along the text.

    Args:
      memory: of the text.
      name: ``norms`` or ``ranks``, a field of `LayerMemory`.
    """
    layers = [(n, part) for n, part in enumerate(memory.layers, 1) if part is not None]
    columns = min(len(layers), _COLUMNS)
    rows = -(-len(layers) // columns)
    with new_figure(FITTING, 0.4 + 2.3 * rows) as figure:
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        for axes in grid.flat[len(layers) :]:
            axes.set_axis_off()
        for axes, (number, part) in zip(grid.flat, layers, strict=False):
            values = getattr(part, name)
            points, heads = values.shape
            for head, style in enumerate(line_styles(heads)):
                axes.plot(
                    memory.positions,
                    values[:, head],
                    markevery=sparse_markers(points, head, heads),
                    label=f"head {head + 1}",
                    **style,
                )
            axes.set(title=f"layer {number}", xlabel="tokens read")
            axes.grid(axis="y")
        grid[0, 0].set_ylim(bottom=0)
        for axes in grid[:, 0]:
            axes.set_ylabel("norm of the state" if name == "norms" else "effective rank")
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(
            handles[:_MOST_NAMED], labels[:_MOST_NAMED], loc="outside upper center", ncols=4
        )
        return png(figure)


def draw_position_loss(loss: PositionLoss, window: int) -> bytes:
    """Loss against the tokens of the document read before, carried and reset every `window`."""
    drawn = loss.counts >= min(_FEWEST, loss.counts.max())
    middles = loss.starts[drawn] * 2**0.5
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
            label=f"state reset every {counted(window, 'token')} (training window)",
        )
        axes.set_xscale("log", base=2)
        _few_ticks(axes, loss.starts[drawn])
        axes.set(xlabel="tokens of the document read before the prediction")
        axes.set_ylabel("loss (nats per token)")
        axes.grid(axis="y")
        axes.legend(loc="upper right")
        return png(figure)


def draw_reset_loss(losses: dict[int, Evaluation], window: int) -> bytes:
    """Loss against the interval of resets; 0 is never and a line across."""
    intervals = sorted(interval for interval in losses if interval)
    values = [losses[interval].nats_per_token for interval in intervals]
    with new_figure(FITTING, 4) as figure:
        axes = figure.subplots()
        axes.plot(intervals, values, color="tab:orange", marker="s", label="state reset")
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
        axes.axhline(losses[0].nats_per_token, color="tab:blue", label="state carried, never reset")
        axes.set_xscale("log", base=2)
        _few_ticks(axes, intervals)
        axes.set(xlabel="tokens between two resets", ylabel="loss (nats per token)")
        axes.grid(axis="y")
        axes.legend(loc="upper right")
        return png(figure)


def _few_ticks(axes: Any, places: Sequence[int]) -> None:
    """Ticks at some of `places`, so few that their numbers do not touch."""
    some = list(places)[:: -(-len(places) // 7)]
    axes.set_xticks(some, [f"{place:,}" for place in some])
    axes.xaxis.minorticks_off()


def _plain(value: float, _: Any = None) -> str:
    return f"{value:,g}"
