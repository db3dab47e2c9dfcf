"""An `Explanation` as a self-contained HTML page, and as numbers for programs."""

import base64
import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from simplernn_jax.analysis import plots
from simplernn_jax.analysis.explanation import Explanation
from simplernn_jax.analysis.memory import SHORT_CONTEXT
from simplernn_jax.errors import counted
from simplernn_jax.files import page_template


def draw_plots(explanation: Explanation) -> dict[str, bytes]:
    """Draw all plots; return PNG files by name."""
    window, chosen = explanation.window, explanation.chosen
    position = chosen.position - 1 - explanation.start
    drawn = {
        f"map_layer_{number}": plots.draw_map(layer, explanation.units, explanation.start, position)
        for number, layer in enumerate(explanation.layers, 1)
    }
    if any(lives is not None for lives in explanation.half_lives):
        drawn["half_lives"] = plots.draw_half_lives(explanation.half_lives, window)
    drawn["loss_by_position"] = plots.draw_position_loss(explanation.by_position, window)
    panels = [("all layers, by gradient", "gradient times input (nats)", chosen.from_all)]
    for name, shares in zip(explanation.layer_names, chosen.by_layer, strict=True):
        panels.append((f"{name}, by its map", "share of the output", shares))
    drawn["contributions"] = plots.draw_contributions(panels, chosen.units)
    return drawn


def make_page(
    explanation: Explanation, pictures: Mapping[str, bytes], name: str, facts: Mapping[str, str]
) -> str:
    """Return the HTML of the page of the text `name`; `facts` describe the model by name."""
    chosen = explanation.chosen
    gradient = plots.sum_by_unit(chosen.units, chosen.from_all.tokens)
    lives = [layer.ravel() for layer in explanation.half_lives if layer is not None]
    filters = {"shown": _shown, "visible": plots.visible, "zip": zip}
    return page_template("analysis/explanation.html", filters).render(
        title=f"Explanation of {name}",
        explanation=explanation,
        chosen=chosen,
        mixers=explanation.mixers,
        plots={key: base64.b64encode(picture).decode() for key, picture in pictures.items()},
        counted=counted,
        lives=np.concatenate(lives) if lives else None,
        short_context=SHORT_CONTEXT,
        probability=np.exp(-chosen.nats),
        facts={
            **facts,
            "text": f"{name}: {counted(len(explanation.tokens) - 1, 'token')} and BOS, token 0",
            "maps": f"tokens {explanation.start:,} to {explanation.stop - 1:,} of it",
        },
        median=np.median,
        sum_by_unit=plots.sum_by_unit,
        gradient=gradient,
        full_nats=max(np.abs(gradient).max(), 0.5),  # weak contributions do not look strong
    )


def _shown(text: str) -> str:
    """Return a text with spaces unchanged and line ends both visible and effective."""
    return "".join(c if c == " " else plots.visible(c) + ("\n" if c == "\n" else "") for c in text)


def to_numbers(explanation: Explanation) -> dict[str, Any]:
    """Return the fields of an explanation as JSON: lists, six digits, None for non-finite.

    Of each layer's decomposition, its map up to the diagonal and its errors.
    """
    layers = [
        {
            "map": [[row[: t + 1] for t, row in enumerate(head)] for head in layer.weights[0]],
            "operator_error": layer.operator_error,
            "layer_error": layer.layer_error,
        }
        for layer in explanation.layers
    ]
    numbers: dict[str, Any] = _plain(vars(explanation) | {"layers": layers})
    return numbers


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return _plain(vars(value))
    if hasattr(value, "_asdict"):
        return _plain(value._asdict())
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, float):
        return float(f"{value:.6g}") if np.isfinite(value) else None
    return value
