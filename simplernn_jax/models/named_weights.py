"""Conversion of parameters to and from PyTorch names and layouts.

Matrices are ``[out, in]``. A model with ``block="plain"`` has the names of the original PyTorch
project: ``embedding.weight``, ``layers.N.query_proj.weight``, ``lm_head.bias`` and so on; those of
the residual block follow the same scheme, and ``block="swiglu"`` has the names of
flash-linear-attention.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from simplernn_jax.config import ModelConfig
from simplernn_jax.errors import UserError, counted
from simplernn_jax.models.language_model import LanguageModel

Weights = Mapping[str, Any]
"""Name of each parameter and its value, an array of NumPy or JAX."""

_MODULES = {"head": "lm_head", "final_scale": "final_norm"}
_LAYER = re.compile(r"(?:model\.)?layers\.(\d+)\.")
_LEVELS = ("mixer", "cell")
"""Module levels that PyTorch names omit."""

_FLA_MODULES = {
    "embedding": "model.embeddings",
    "final_scale": "model.norm",
    "head": "lm_head",
    "layers": "model.layers",
    "mixer_norm": "attn_norm",
    "mixer": "attn",
    "query_proj": "q_proj",
    "key_proj": "k_proj",
    "value_proj": "v_proj",
    "output_gate_proj": "g_proj",
    "gate_down_proj": "gk_proj.0",
    "gate_up_proj": "gk_proj.1",
    "out_proj": "o_proj",
    "head_norm": "g_norm_swish_gate",
    "query": "q_conv1d",
    "key": "k_conv1d",
    "value": "v_conv1d",
    "mlp_gate": "mlp.gate_proj",
    "mlp_up": "mlp.up_proj",
    "mlp_down": "mlp.down_proj",
}


def weight_name(path: tuple[Any, ...], block: str) -> str:
    """Name the parameter at `path` of `nnx.state`, such as ``("head", "kernel")``."""
    if block == "swiglu":
        words = [_FLA_MODULES.get(word, str(word)) for word in path if word != "convolutions"]
    else:
        words = [_MODULES.get(word, str(word)) for word in path if word not in _LEVELS]
    if path[-1] in ("kernel", "embedding", "weights", "scale"):
        words[-1] = "weight"
    elif path[-1] == "final_scale":
        words.append("weight")
    return ".".join(words)


def named_weights(model: LanguageModel) -> dict[str, np.ndarray]:
    """Return the parameters of `model`, float32 arrays by name."""
    block = model.config.block
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    named = {
        weight_name(path, block): np.ascontiguousarray(
            _to_torch(path, np.asarray(param[...]), block)
        )
        for path, param in flat
    }
    if len(named) < len(flat):
        raise UserError(
            "two parameters of a mixer have one name in files, where kernel, weights, scale and "
            "embedding are all called weight; rename one of them"
        )
    return named


def model_from_weights(config: ModelConfig, weights: Weights, where: str) -> LanguageModel:
    """Build a model from the parameters `weights`.

    Args:
      config: sizes; every parameter must be there, in its shape.
      weights: as `named_weights` returns them.
      where: the file, for messages.

    Returns:
      A `LanguageModel` with these parameters, in float32.

    Raises:
      UserError: a parameter is missing, unexpected, or has another shape.
    """
    # Before the model is built, which takes minutes for a few hundred layers.
    layers = {match[1] for name in weights if (match := _LAYER.match(name))}
    if len(layers) < config.num_layers:
        raise UserError(
            f"{where}: expected {counted(config.num_layers, 'layer')}, found {len(layers)}; use "
            "the weights and settings of one model"
        )
    # Shapes only: every value comes from `weights`.
    abstract = nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))
    graph, params = nnx.split(abstract, nnx.Param)
    flat = list(nnx.to_flat_state(params))
    block = config.block
    shapes = {
        weight_name(path, block): _to_torch(path, np.broadcast_to(0, param.shape), block).shape
        for path, param in flat
    }
    check_names_and_shapes(shapes, weights, where)
    for path, param in flat:
        value = _from_torch(path, weights[weight_name(path, block)], block)
        param.set_value(jnp.asarray(value, jnp.float32))
    return nnx.merge(graph, params)


def check_names_and_shapes(
    shapes: Mapping[str, tuple[int, ...]], weights: Weights, where: str
) -> None:
    """Raise `UserError` unless `weights` has exactly the names and the shapes of `shapes`."""
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
                "as for the other weights or the configuration; use those of one model"
            )


def _to_torch(path: tuple[Any, ...], value: np.ndarray, block: str) -> np.ndarray:
    if path[-1] == "weights" and block == "swiglu":
        return value.T[:, None, ::-1]  # the last weight multiplies the current token
    return value.T if path[-1] in ("kernel", "weights") else value


def _from_torch(path: tuple[Any, ...], value: Any, block: str) -> Any:
    if path[-1] == "weights" and block == "swiglu":
        return value[:, 0, ::-1].T
    return value.T if path[-1] in ("kernel", "weights") else value
