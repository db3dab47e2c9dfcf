"""Weights of the PyTorch project, as a `LanguageModel` with ``block="plain"``.

A file holds ``embedding.weight``, ``layers.N.{query,key,value,gate,out}_proj.{weight,bias}`` and
``lm_head.{weight,bias}``. Nothing in it is executed.
"""

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import nnx

from simplernn_jax.config import ModelConfig, nearest_name
from simplernn_jax.errors import UserError
from simplernn_jax.models.language_model import LanguageModel

Weights = dict[str, np.ndarray]
"""PyTorch's name of each parameter and its value, float32; matrices are ``[out, in]``."""

_PROJECTIONS = ("query_proj", "key_proj", "value_proj", "gate_proj", "out_proj")


def load_pytorch_weights(path: str) -> LanguageModel:
    """The language model whose weights lie in `path`; its sizes follow from their shapes.

    Args:
      path: ``.pt``: a state dict, alone or under ``model_state_dict`` (this needs torch);
        or ``.safetensors``.

    Returns:
      A `LanguageModel` in float32, which gives the logits that the PyTorch model gave.

    Raises:
      UserError: the file cannot be read, or holds other names or shapes than this model has.
    """
    weights = read_pytorch_weights(path)
    config = _model_config(weights, path)
    _check_names_and_shapes(weights, config, path)
    # Shapes only: every value comes from the file.
    model: LanguageModel = nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))
    model.embedding.embedding.set_value(jnp.asarray(weights["embedding.weight"]))
    for index, layer in enumerate(model.layers):
        for name in _PROJECTIONS:
            _fill_linear(getattr(layer.rnn.cell, name), weights, f"layers.{index}.{name}")
    _fill_linear(model.head, weights, "lm_head")
    return model


def read_pytorch_weights(path: str) -> Weights:
    """The arrays in `path`, as they are named there; see `load_pytorch_weights`.

    Raises:
      UserError: the file is missing, damaged, of another kind, or holds more than tensors.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; name a .pt or .safetensors file")
    match Path(path).suffix:
        case ".pt":
            return _read_pt(path)
        case ".safetensors":
            return _read_safetensors(path)
    raise UserError(f"{path}: not a .pt or .safetensors file; save the state dict as one of them")


def _read_pt(path: str) -> Weights:
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"{path}: reading a .pt needs PyTorch; pip install torch, or convert it to .safetensors"
        ) from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}: holds more than tensors and plain containers, or is damaged, and was not "
            "loaded; save only model.state_dict() with torch.save"
        ) from error
    except (RuntimeError, ValueError, EOFError, zipfile.BadZipFile) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path}: cannot be read ({reason}); use an undamaged file") from error
    if isinstance(content, dict):
        content = content.get("model_state_dict", content)
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no state dict; save model.state_dict() with torch.save")
    for name, value in content.items():
        if not isinstance(value, torch.Tensor):
            raise UserError(
                f"{path}: {name!r} is no tensor; save the state dict alone or under "
                "'model_state_dict'"
            )
    return {name: value.float().numpy() for name, value in content.items()}


def _read_safetensors(path: str) -> Weights:
    try:
        weights = safetensors.numpy.load_file(path)  # JAX has taught NumPy bfloat16
    except safetensors.SafetensorError as error:
        raise UserError(f"{path}: cannot be read ({error}); use an undamaged file") from error
    return {name: value.astype(np.float32) for name, value in weights.items()}


def _model_config(weights: Weights, path: str) -> ModelConfig:
    def rows_and_columns(name: str) -> tuple[int, ...]:
        if name not in weights:
            raise UserError(
                f"{path}: {name} is missing{nearest_name(name, weights)}; "
                "the file is not from this model"
            )
        shape = weights[name].shape
        if len(shape) != 2:
            raise UserError(f"{path}: {name} has shape {list(shape)}; a matrix is needed")
        return shape

    indices = {match[1] for name in weights if (match := re.match(r"layers\.(\d+)\.", name))}
    vocab_size, hidden_dim = rows_and_columns("embedding.weight")
    return ModelConfig(
        vocab_size=vocab_size,
        block="plain",
        num_layers=max(1, len(indices)),
        hidden_dim=hidden_dim,
        key_dim=rows_and_columns("layers.0.query_proj.weight")[0],
        value_dim=rows_and_columns("layers.0.value_proj.weight")[0],
        num_heads=1,
        tie_embeddings=False,
    )


def _expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    hidden, key, value = config.hidden_dim, config.key_dim, config.value_dim
    widths = {
        "query_proj": (key, hidden),
        "key_proj": (key, hidden),
        "value_proj": (value, hidden),
        "gate_proj": (key, hidden),
        "out_proj": (hidden, value),
    }
    linears = {
        f"layers.{index}.{name}": shape
        for index in range(config.num_layers)
        for name, shape in widths.items()
    }
    linears["lm_head"] = (config.vocab_size, hidden)
    shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (config.vocab_size, hidden)}
    for name, shape in linears.items():
        shapes[f"{name}.weight"] = shape
        shapes[f"{name}.bias"] = shape[:1]
    return shapes


def _check_names_and_shapes(weights: Weights, config: ModelConfig, path: str) -> None:
    expected = _expected_shapes(config)
    for kind, names in (
        ("missing", [name for name in expected if name not in weights]),
        ("unexpected", [name for name in weights if name not in expected]),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(
                f"{path}: {names[0]}{more} {kind}; the weights must be those of "
                f"{config.num_layers} plain SimpleRNN layers"
            )
    for name, shape in expected.items():
        if weights[name].shape != shape:
            raise UserError(
                f"{path}: {name} has shape {list(weights[name].shape)}, and {list(shape)} follows "
                "from the other weights; use weights of one model"
            )


def _fill_linear(linear: Any, weights: Weights, name: str) -> None:
    linear.kernel.set_value(jnp.asarray(weights[f"{name}.weight"].T))
    linear.bias.set_value(jnp.asarray(weights[f"{name}.bias"]))
