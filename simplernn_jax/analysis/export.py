"""The numbers of an `Explanation` for programs."""

import dataclasses
import math
from typing import Any

import numpy as np

from simplernn_jax.analysis.explanation import Explanation


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
