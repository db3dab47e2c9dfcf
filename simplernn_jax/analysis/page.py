"""An `Explanation` as a self-contained HTML page (see page.html), and as numbers for programs."""

import base64
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jinja2
import numpy as np

from simplernn_jax.analysis import plots
from simplernn_jax.analysis.explanation import Explanation
from simplernn_jax.analysis.memory import half_gone
from simplernn_jax.analysis.plots import DPI, FITTING, Plot
from simplernn_jax.analysis.state_value import SHORT_CONTEXT
from simplernn_jax.analysis.token_text import quoted, sum_by_unit, visible
from simplernn_jax.errors import counted


def summarize(explanation: Explanation) -> list[str]:
    """Return sentences on the model's memory and its use, with the numbers of this text."""
    chosen = explanation.chosen
    return [
        *_memory(explanation),
        *_attention(explanation),
        _gain(explanation),
        f"The page decomposes one prediction: {quoted(chosen.predicted.text)}, number "
        f"{chosen.position:,} of the text, to which the model gave a probability of "
        f"{math.exp(-chosen.nats):.1%}.",
    ]


def _memory(explanation: Explanation) -> list[str]:
    lives = [layer.half_lives.ravel() for layer in explanation.memory.layers if layer is not None]
    if not lives:
        return []
    every = np.concatenate(lives)
    half = _distance(explanation, half_gone(every))
    longest = _distance(explanation, float(every.max()))
    return [
        "The model reads a text once, from left to right, and carries a memory of fixed size "
        f"along. On average, half of the content of this memory is gone after {half}.",
        f"Of the {every.size:,} channels of its memory, the longest-lived loses half only "
        f"after {longest}.",
    ]


def _attention(explanation: Explanation) -> list[str]:
    number = explanation.mixers.count("attention")
    if not number:
        return []
    distance = _distance(explanation, explanation.attention_context)
    subject = "Its layer of attention sees" if number == 1 else "Its layers of attention each see"
    return [f"{subject} the last {distance} exactly, and nothing before them."]


def _gain(explanation: Explanation) -> str:
    gain = explanation.context_gain
    far = _distance(explanation, SHORT_CONTEXT)
    if gain is None:
        return f"The text is too short to measure the gain from more than {far} back."
    where = f"measured on the last {counted(gain.predictions, 'prediction')} of this text"
    if gain.everything <= 0:
        return f"Text more than one token back does not improve the predictions at all ({where})."
    share = gain.far / gain.everything
    if share <= 0:
        return (
            f"Text more than {far} back does not help: without it, the predictions are as good or "
            f"better ({where})."
        )
    if share > 1:
        return (
            f"All of the gain of its predictions from earlier text comes from more than {far} back "
            f"({where}): nearer text alone makes them worse."
        )
    return (
        f"{share:.1%} of the gain of its predictions from earlier text comes from more than "
        f"{far} back ({where}); the rest comes from nearer text."
    )


def _distance(explanation: Explanation, tokens: float) -> str:
    """Return a distance in characters and, if the numbers differ, in tokens."""
    if math.isinf(tokens):
        return "more characters than any text has"
    ratio = explanation.characters_per_token
    shown = _rounded(tokens * ratio, "character")
    is_same = math.isclose(ratio, 1, abs_tol=1e-3)
    return shown if is_same else f"{shown} ({_rounded(tokens, 'token')})"


def _rounded(number: float, noun: str) -> str:
    """Return ``1 token``, ``2.8 tokens`` or ``1,234 tokens``: two digits, or whole above 10."""
    text = f"{number:,.0f}" if number >= 10 else f"{number:.2g}"
    return f"{text} {noun}" if text == "1" else f"{text} {noun}s"


_STRONGEST = 0.7
"""Opacity of full color behind a word, which must stay readable."""
_FULL_SHARE = 0.5
"""Share of a layer's output that has full color behind a text."""
_MIN_FULL_NATS = 0.5
"""Least contribution with full color: a smaller one would make weak contributions look strong."""


def draw_plots(explanation: Explanation) -> dict[str, Plot]:
    """Draw all plots; return them by name."""
    memory, value = explanation.memory, explanation.state_value
    drawn = [plots.draw_map(explanation, n) for n in range(len(explanation.layers))]
    if explanation.start:
        drawn.append(plots.draw_state_share(explanation))
    if any(memory.layers):
        drawn.append(plots.draw_half_lives(memory, value.window))
        drawn += [plots.draw_state(memory, name) for name in ("state_norm", "state_rank")]
    drawn.append(plots.draw_position_loss(value.by_position, value.window))
    drawn.append(plots.draw_reset_loss(value.by_reset, value.window))
    drawn.append(plots.draw_contributions(explanation))
    return {plot.name: plot for plot in drawn}


def make_page(
    explanation: Explanation, pictures: Mapping[str, Plot], name: str, facts: Mapping[str, str]
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
        plots=pictures,
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
            (name, shares.state, plots.contributions_by_unit(explanation, layer))
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


def to_numbers(explanation: Explanation) -> dict[str, Any]:
    """Return everything the plots show as JSON: lists, six digits, None for non-finite.

    Weights of a map are rounded to the fourth digit of their head's largest: a thousand tokens
    have half a million weights per head.
    """
    chosen, value = explanation.chosen, explanation.state_value
    gain = explanation.context_gain
    layers = []
    for number, layer in enumerate(explanation.layers):
        numbers: dict[str, Any] = {
            "mixer": explanation.mixers[number],
            "operator_error": layer.operator_error,
            "layer_error": layer.layer_error,
            "map": [_triangle(head) for head in np.asarray(layer.weights[0])],
            "contributions": chosen.by_layer[number]._asdict(),
        }
        memory = explanation.memory.layers[number]
        if memory is not None:
            numbers["half_lives"] = memory.half_lives
            numbers["state_norm"] = memory.norms
            numbers["state_effective_rank"] = memory.ranks
        layers.append(numbers)
    losses = [
        {"reset_every": interval, **dataclasses.asdict(result)}
        for interval, result in value.by_reset.items()
    ]
    return _plain(
        {
            "tokens": explanation.tokens,
            "map_start": explanation.start,
            "map_stop": explanation.stop,
            "state_positions": explanation.memory.positions,
            "layers": layers,
            "prediction": {
                "token": chosen.position,
                "reason": chosen.reason,
                "nats": chosen.nats,
                "contributions": chosen.from_all._asdict(),
            },
            "context_gain": None if gain is None else gain._asdict(),
            "evaluated": value.evaluated,
            "window": value.window,
            "loss_by_position": value.by_position._asdict(),
            "loss_by_reset": losses,
        }
    )


def _triangle(weights: np.ndarray) -> list[np.ndarray]:
    """Return the rounded weights of tokens 0 .. t for every output t."""
    largest = float(np.abs(weights).max())
    decimals = 3 - math.floor(math.log10(largest)) if largest > 0 else 0
    rounded = np.round(weights.astype(np.float64), decimals)
    return [row[: t + 1] for t, row in enumerate(rounded)]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, float):
        return float(f"{value:.6g}") if np.isfinite(value) else None
    return value
