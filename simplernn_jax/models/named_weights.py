"""Parameters under the names and in the layout of PyTorch, and back.

Matrices are ``[out, in]``. A model with ``block="plain"`` has the names of the original PyTorch
project: ``embedding.weight``, ``layers.N.query_proj.weight``, ``lm_head.bias`` and so on; the other
parameters are named alike.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from simplernn_jax.config import ModelConfig
from simplernn_jax.errors import UserError
from simplernn_jax.models.language_model import LanguageModel

Weights = Mapping[str, Any]
"""Name of each parameter and its value, an array of NumPy or JAX."""

_MODULES = {"head": "lm_head", "final_scale": "final_norm"}
_LEVELS = ("mixer", "cell")
"""Levels of modules that have no level in the names."""


def weight_name(path: tuple[Any, ...]) -> str:
    """Name the parameter at `path` of `nnx.state`, such as ``("head", "kernel")``."""
    words = [_MODULES.get(word, str(word)) for word in path if word not in _LEVELS]
    if words[-1] in ("kernel", "embedding", "weights"):
        words[-1] = "weight"
    return ".".join(words if len(words) > 1 else [*words, "weight"])


def named_weights(model: LanguageModel) -> dict[str, np.ndarray]:
    """Return the parameters of `model`, float32 arrays by name."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {
        weight_name(path): np.ascontiguousarray(_transposed(path, np.asarray(param[...])))
        for path, param in flat
    }


def model_from_weights(config: ModelConfig, weights: Weights, where: str) -> LanguageModel:
    """Make a model of the parameters `weights`.

    Args:
      config: sizes; every parameter must be there, in its shape.
      weights: as of `named_weights`.
      where: the file, for messages.

    Raises:
      UserError: a parameter is missing, unexpected, or has another shape.
    """
    # Shapes only: every value comes from `weights`.
    abstract = nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))
    graph, params = nnx.split(abstract, nnx.Param)
    flat = list(nnx.to_flat_state(params))
    shapes = {weight_name(path): _torch_shape(path, param.shape) for path, param in flat}
    check_names_and_shapes(shapes, weights, where)
    for path, param in flat:
        param.set_value(jnp.asarray(_transposed(path, weights[weight_name(path)]), jnp.float32))
    return nnx.merge(graph, params)


def check_names_and_shapes(
    shapes: Mapping[str, tuple[int, ...]], weights: Weights, where: str
) -> None:
    """Check that `weights` has all names of `shapes`, in these shapes, and no others.

    Raises:
      UserError: names the first that is missing, unexpected or of another shape.
    """
    for kind, names in (
        ("missing", [name for name in shapes if name not in weights]),
        ("unexpected", [name for name in weights if name not in shapes]),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(f"{where}: {names[0]}{more} {kind}; use the weights of one model")
    for name, shape in shapes.items():
        if weights[name].shape != shape:
            raise UserError(
                f"{where}: {name} has shape {list(weights[name].shape)}; expected {list(shape)} "
                "from the other weights; use weights of one model"
            )


def _transposed(path: tuple[Any, ...], value: Any) -> Any:
    return value.T if path[-1] in ("kernel", "weights") else value


def _torch_shape(path: tuple[Any, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[::-1] if path[-1] in ("kernel", "weights") else shape
