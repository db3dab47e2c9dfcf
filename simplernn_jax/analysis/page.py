"""The HTML page of an `Explanation`: a summary, then four sections from results to details."""

import math
from collections.abc import Iterator, Mapping

import numpy as np

from simplernn_jax.analysis import map_plots, plots
from simplernn_jax.analysis.explanation import Explanation
from simplernn_jax.analysis.html_parts import (
    color_scale,
    document,
    facts_list,
    figure,
    heading,
    paragraph,
    shaded_text,
    summary,
    table,
)
from simplernn_jax.analysis.map_plots import contributions_by_unit
from simplernn_jax.analysis.plots import Plot
from simplernn_jax.analysis.summary import summarize
from simplernn_jax.analysis.token_text import quoted, sum_by_unit
from simplernn_jax.config_rules import MIXERS
from simplernn_jax.errors import counted

TITLE = "Explanation of a text"

_FULL_SHARE = 0.5
"""Share of a layer's output that has full color behind a text."""
_MIN_FULL_NATS = 0.5
"""Least contribution with full color: a smaller one would make weak contributions look strong."""
_WEIGHTS = {
    "simple_rnn": "A recurrence has A_tj = sum over key channels of q_t k_j times all gates from "
    "j + 1 to t: an exact implicit attention map.",
    "attention": "Softmax attention has A_tj = softmax over j of q_t k_j / sqrt(K) by definition, "
    "over the last tokens that it sees.",
}


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


def make_page(explanation: Explanation, plots: Mapping[str, Plot], facts: Mapping[str, str]) -> str:
    """Return the HTML of the page.

    Args:
      explanation: its content.
      plots: from `draw_plots`.
      facts: names and values that describe the model.
    """
    chosen = explanation.chosen
    facts = {
        **facts,
        "text": f"{counted(len(explanation.tokens) - 1, 'token')} and BOS, which is token 0",
        "maps": f"tokens {explanation.start:,} to {explanation.stop - 1:,} of it",
        "prediction": f"token {chosen.position:,}, {quoted(chosen.predicted.text)}",
    }
    parts = [
        summary(summarize(explanation)),
        facts_list(facts),
        *_memory_section(explanation, plots),
        *_value_section(explanation, plots),
        *_prediction_section(explanation, plots),
        *_attention_section(explanation, plots),
    ]
    return document(TITLE, parts)


def _memory_section(explanation: Explanation, plots: Mapping[str, Plot]) -> Iterator[str]:
    yield heading("1. The memory of the model")
    if "attention" in explanation.mixers:
        rest = "; its layers are left out here." if "simple_rnn" in explanation.mixers else "."
        yield paragraph(
            "Attention keeps the keys and values of its last tokens unchanged: it has neither "
            f"half-lives nor a state that fills up{rest}"
        )
    window = explanation.state_value.window
    rows = []
    for number, layer in enumerate(explanation.memory.layers, 1):
        if layer is not None:
            lives = layer.half_lives.ravel()
            longer = f"{np.sum(lives > window):,} of {lives.size:,}"
            rows.append(
                (f"layer {number}", f"{np.median(lives):,.1f}", f"{lives.max():,.1f}", longer)
            )
    if rows:
        beyond = f"channels beyond {counted(window, 'token')}"
        yield table(("half-life in tokens", "median", "longest", beyond), rows)
    for name in ("half_lives", "state_norm", "state_rank"):
        if name in plots:
            yield _figure(plots[name])


def _value_section(explanation: Explanation, plots: Mapping[str, Plot]) -> Iterator[str]:
    value = explanation.state_value
    yield heading("2. The value of the state")
    yield paragraph(f"Evaluated on {value.evaluated}, the same ones each time.")
    if "attention" in explanation.mixers:
        yield paragraph("The state of attention is its cache of keys and values.")
    yield _figure(plots["loss_by_position"])
    yield _figure(plots["loss_by_reset"])
    rows = []
    for interval, result in sorted(value.by_reset.items(), key=lambda item: item[0] or math.inf):
        name = f"reset every {counted(interval, 'token')}" if interval else "carried, never reset"
        name += " (every training window)" if interval == value.window else ""
        rows.append((name, f"{result.nats_per_token:.4f}", f"{result.bits_per_byte:.4f}"))
    yield table(("state", "nats/token", "bits/byte"), rows)


def _prediction_section(explanation: Explanation, plots: Mapping[str, Plot]) -> Iterator[str]:
    chosen = explanation.chosen
    yield heading("3. Contributions to one prediction")
    yield paragraph(
        f"The prediction of token {chosen.position:,}, framed below, with a loss of "
        f"{chosen.nats:.3f} nats (probability {np.exp(-chosen.nats):.3g}). "
        f"Chosen because: {chosen.reason}."
    )
    rest = "the rest of its word, which the model has not read, is gray. " if chosen.rest else ""
    gradient = sum_by_unit(chosen.units, chosen.from_all.tokens)
    strongest = max(float(np.abs(gradient).max()), _MIN_FULL_NATS)
    yield paragraph(
        "Through all layers: the gradient of its log-probability times the embedding of each "
        "earlier token. Red tokens made the prediction more probable, blue ones less; "
        f"{rest}To first order only."
    )
    yield color_scale(f"{strongest:.2g} nats")
    yield shaded_text(chosen.units, gradient, strongest, chosen.predicted, chosen.rest)
    yield color_scale(f"{_FULL_SHARE:.0%} of the output, or more")
    for layer, name in enumerate(explanation.layer_names):
        state = chosen.by_layer[layer].state
        yield paragraph(
            f"{name.capitalize()}, by its map: share of each token in the output after the last "
            "token, mean over heads; all shares sum to 1"
            + (f", {state:z.3f} of it from before this excerpt." if state else ".")
        )
        shares = contributions_by_unit(explanation, layer)
        yield shaded_text(chosen.units, shares, _FULL_SHARE, chosen.predicted, chosen.rest)
    yield _figure(plots["contributions"])


def _attention_section(explanation: Explanation, plots: Mapping[str, Plot]) -> Iterator[str]:
    yield heading("4. Attention maps")
    definitions = " ".join(_WEIGHTS[mixer] for mixer in MIXERS if mixer in explanation.mixers)
    yield paragraph(
        "Every output of a layer is y_t = sum over j of A_tj v_j, plus the part that the state "
        f"before the first token gives. {definitions}"
    )
    yield paragraph(
        "The table gives the error of that sum against the operator, scan or softmax attention, "
        "on the same inputs, and the error of the layer's output made from that sum against the "
        "model's own: RMS of the difference over RMS of the output. In higher layers, token j "
        "stands for all that the layers below gathered there."
    )
    rows = [
        (name, f"{layer.operator_error:.1e}", f"{layer.layer_error:.1e}")
        for name, layer in zip(explanation.layer_names, explanation.layers, strict=True)
    ]
    yield table(("error of the map", "against the operator", "against the layer's output"), rows)
    for name, plot in plots.items():
        if name.startswith("map_layer_") or name == "state_share":
            yield _figure(plot)


def _figure(plot: Plot) -> str:
    return figure(plot.png, plot.title, plot.caption, f"{plot.name}.png")
