"""The HTML page of an `Explanation`, self-contained and readable offline: see page.html."""

import base64
import math
from collections.abc import Mapping

import jinja2
import numpy as np

from simplernn_jax.analysis import map_plots, plots
from simplernn_jax.analysis.explanation import Explanation
from simplernn_jax.analysis.plots import DPI, FITTING, Plot
from simplernn_jax.analysis.summary import summarize
from simplernn_jax.analysis.token_text import quoted, sum_by_unit, visible
from simplernn_jax.errors import counted

_STRONGEST = 0.7
"""Opacity of full color behind a word, which must stay readable."""
_FULL_SHARE = 0.5
"""Share of a layer's output that has full color behind a text."""
_MIN_FULL_NATS = 0.5
"""Least contribution with full color: a smaller one would make weak contributions look strong."""


def draw_plots(explanation: Explanation) -> dict[str, Plot]:
    """Draw all plots; return them by name."""
    memory, value = explanation.memory, explanation.state_value
    drawn = [map_plots.draw_map(explanation, n) for n in range(len(explanation.layers))]
    if explanation.start:
        drawn.append(map_plots.draw_state_share(explanation))
    if "simple_rnn" in explanation.mixers:
        drawn.append(plots.draw_half_lives(memory, value.window))
        drawn += [plots.draw_state(memory, name) for name in ("state_norm", "state_rank")]
    drawn.append(plots.draw_position_loss(value.by_position, value.window))
    drawn.append(plots.draw_reset_loss(value.by_reset, value.window))
    drawn.append(map_plots.draw_contributions(explanation))
    return {plot.name: plot for plot in drawn}


def make_page(
    explanation: Explanation, plots: Mapping[str, Plot], name: str, facts: Mapping[str, str]
) -> str:
    """Return the HTML of the page of the text `name`; `facts` describe the model by name."""
    chosen, value = explanation.chosen, explanation.state_value
    gradient = sum_by_unit(chosen.units, chosen.from_all.tokens)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("simplernn_jax.analysis", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(base64=_base64, shown=_shown, zip=zip)
    environment.tests["wide"] = _is_wide
    return environment.get_template("page.html").render(
        name=name,
        chosen=chosen,
        value=value,
        mixers=explanation.mixers,
        plots=plots,
        counted=counted,
        strongest=_STRONGEST,
        sentences=summarize(explanation),
        facts={
            **facts,
            "text": f"{name}: {counted(len(explanation.tokens) - 1, 'token')} and BOS, token 0",
            "maps": f"tokens {explanation.start:,} to {explanation.stop - 1:,} of it",
            "prediction": f"token {chosen.position:,}, {quoted(chosen.predicted.text)}",
        },
        half_lives=_half_lives(explanation),
        losses=_losses(explanation),
        probability=np.exp(-chosen.nats),
        gradient=gradient,
        full_nats=max(float(np.abs(gradient).max()), _MIN_FULL_NATS),
        full_share=_FULL_SHARE,
        by_layer=[
            (name, shares.state, map_plots.contributions_by_unit(explanation, layer))
            for layer, (name, shares) in enumerate(
                zip(explanation.layer_names, chosen.by_layer, strict=True)
            )
        ],
        errors=[
            (name, f"{layer.operator_error:.1e}", f"{layer.layer_error:.1e}")
            for name, layer in zip(explanation.layer_names, explanation.layers, strict=True)
        ],
    )


def _half_lives(explanation: Explanation) -> list[tuple[str, ...]]:
    """Return the rows of the recurrent layers."""
    window = explanation.state_value.window
    rows: list[tuple[str, ...]] = []
    for number, layer in enumerate(explanation.memory.layers, 1):
        if layer is not None:
            lives = layer.half_lives.ravel()
            longer = f"{np.sum(lives > window):,} of {lives.size:,}"
            median, longest = f"{np.median(lives):,.1f}", f"{lives.max():,.1f}"
            rows.append((f"layer {number}", median, longest, longer))
    return rows


def _losses(explanation: Explanation) -> list[tuple[str, ...]]:
    """Return the rows of the intervals between resets, carried states last."""
    value = explanation.state_value
    rows: list[tuple[str, ...]] = []
    for interval, result in sorted(value.by_reset.items(), key=lambda item: item[0] or math.inf):
        name = f"reset every {counted(interval, 'token')}" if interval else "carried, never reset"
        name += " (every training window)" if interval == value.window else ""
        rows.append((name, f"{result.nats_per_token:.4f}", f"{result.bits_per_byte:.4f}"))
    return rows


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")


def _is_wide(plot: Plot) -> bool:
    width = int.from_bytes(plot.png[16:20], "big")  # from the PNG header
    return width > FITTING * DPI + 1


def _shown(text: str) -> str:
    """Return a text with spaces unchanged and line ends both visible and effective."""
    return "".join(c if c == " " else visible(c) + ("\n" if c == "\n" else "") for c in text)
