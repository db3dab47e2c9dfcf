"""Plots over the text: attention maps, the part of the initial state, and contributions."""

from collections.abc import Sequence

import numpy as np

from simplernn_jax.analysis.explanation import Explanation
from simplernn_jax.analysis.plots import FITTING, Plot, add_legend, line_styles, new_figure, png
from simplernn_jax.analysis.token_text import MONOSPACE, Unit, label_text, label_unit, sum_by_unit

_COLUMNS = 2
_TICKS_PER_INCH = 3.2
_COLOR_LEVELS = [-1, -0.3, -0.1, 0, 0.1, 0.3, 1]


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
      panels: title, unit of measure, contribution of each of `units` and that of all text before,
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
