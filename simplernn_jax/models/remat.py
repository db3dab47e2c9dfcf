"""Rematerialization: which residuals of a layer are saved, and which are recomputed."""

from collections.abc import Callable
from typing import Any

import jax


def rematerialize(layer: Callable[..., Any], policy: str) -> Callable[..., Any]:
    """Wrap `layer` so that the backward pass recomputes activations according to `policy`.

    Args:
      layer: called with arrays and None only.
      policy: ``none`` saves all residuals; ``block`` saves the layer's inputs and recomputes the
        rest.

    Raises:
      ValueError: another policy.
    """
    if policy == "none":
        return layer
    if policy != "block":
        raise ValueError(f"{policy=}: must be none or block")

    def call(*inputs: Any) -> Any:  # a new function: JAX caches traces, and layers are mutable
        return layer(*inputs)

    return jax.checkpoint(call)
