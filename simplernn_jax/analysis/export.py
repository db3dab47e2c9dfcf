"""An `Explanation` as numbers for programs."""

import math
from typing import Any

import numpy as np

from simplernn_jax.analysis.explanation import Explanation


def to_numbers(explanation: Explanation) -> dict[str, Any]:
    """Everything the pictures show, for JSON: lists, numbers of 6 digits, None for not finite.

    Weights of a map are rounded to the fourth digit of their head's largest: a thousand tokens
    have half a million of them for each head.
    """
    chosen, value = explanation.chosen, explanation.state_value
    gain = explanation.context_gain
    layers = []
    for mixer, account, memory, given in zip(
        explanation.mixers,
        explanation.accounts,
        explanation.memory.layers,
        chosen.by_layer,
        strict=True,
    ):
        layer: dict[str, Any] = {
            "mixer": mixer,
            "operator_error": account.operator_error,
            "layer_error": account.layer_error,
            "map": [_triangle(head) for head in np.asarray(account.weights[0])],
            "contributions": given._asdict(),
        }
        if memory is not None:
            layer["half_lives"] = memory.half_lives
            layer["state_norm"] = memory.norms
            layer["state_effective_rank"] = memory.ranks
        layers.append(layer)
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
            "loss_by_reset": [
                {
                    "reset_every": interval,
                    "nats_per_token": result.nats_per_token,
                    "bits_per_byte": result.bits_per_byte,
                    "predictions": result.predictions,
                }
                for interval, result in value.by_reset.items()
            ],
        }
    )


def _triangle(weights: np.ndarray) -> list[np.ndarray]:
    """Row t has the weights of tokens 0 .. t, rounded."""
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
