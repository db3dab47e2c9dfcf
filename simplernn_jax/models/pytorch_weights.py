"""Files of PyTorch weights, ``.pt`` and ``.safetensors``; nothing in them is executed.

`load_pytorch_weights` loads weights of the original implementation, ``block="plain"``:
``embedding.weight``, ``layers.N.{query,key,value,gate,out}_proj.{weight,bias}`` and
``lm_head.{weight,bias}``.
"""

import os
import re
import warnings
from pathlib import Path
from typing import BinaryIO

import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from simplernn_jax.config import Config, ModelConfig, TrainConfig, validate
from simplernn_jax.devices import check_memory
from simplernn_jax.errors import UserError, one_line
from simplernn_jax.files import open_file
from simplernn_jax.models.language_model import LanguageModel
from simplernn_jax.models.named_weights import Weights, model_from_weights
from simplernn_jax.models.safetensors_bytes import decode_safetensors, digest_of

_ADVICE = "export the file again"
_METADATA = {"format": "pt"}
_DIGEST = "simplernn_jax.sha256"
"""Metadata key of the digest of `encode_weights`; other programs drop it when they write a file."""


def load_pytorch_weights(path: str) -> LanguageModel:
    """Load a model from PyTorch weights; infer its sizes from their shapes.

    Args:
      path: ``.pt``: a state dict, alone or under ``model_state_dict`` (this needs torch);
        or ``.safetensors``.

    Returns:
      A `LanguageModel` in float32 whose logits match the PyTorch model's.

    Raises:
      UserError: the file cannot be read, or holds other names or shapes than this model has.
    """
    weights = read_pytorch_weights(path)
    config = _model_config(weights, path)
    return model_from_weights(config, weights, path)


def read_pytorch_weights(path: str, digest: str | None = None) -> Weights:
    """Read arrays by PyTorch name.

    Args:
      path: see `load_pytorch_weights`.
      digest: the expected `weights_digest` of a file that has one.

    Returns:
      Float32 NumPy arrays by name.

    Raises:
      UserError: see `load_pytorch_weights`; or the digest does not match.
    """
    read = {".pt": _read_pt, ".safetensors": _read_safetensors}.get(Path(path).suffix)
    if read is None:
        raise UserError(
            f"{path}: not a .pt or .safetensors file; save the state dict as one of them"
        )
    try:
        with open_file(path) as file:
            check_memory(os.fstat(file.fileno()).st_size, path, "load it on a larger machine")
            weights, found = read(path, file)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; specify a .pt or .safetensors file") from error
    except (OSError, ValueError) as error:  # a path may hold a NUL character
        reason = getattr(error, "strerror", None) or one_line(str(error))
        raise UserError(f"{path}: cannot be read ({reason}); {_ADVICE}") from error
    if None not in (found, digest) and found != digest:
        raise UserError(f"{path}: the weights of another model; {_ADVICE}")
    return weights


def weights_digest(weights: Weights) -> str:
    """Return the digest that `encode_weights` stores."""
    return digest_of(_METADATA, weights)


def encode_weights(weights: Weights) -> bytes:
    """Make the content of a safetensors file, with a digest that `read_pytorch_weights` checks."""
    return safetensors.numpy.save(weights, _METADATA | {_DIGEST: weights_digest(weights)})


def _read_pt(path: str, file: BinaryIO) -> tuple[Weights, None]:
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"{path}: reading a .pt needs PyTorch; pip install torch, or convert it to .safetensors"
        ) from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about unknown file versions
            content = torch.load(file, map_location="cpu", weights_only=True)
        content = content.get("model_state_dict", content)
        # A tensor may be far larger than its file: with a stride of 0 it repeats one value.
        check_memory(4 * sum(value.numel() for value in content.values()), path, _ADVICE)
        for name, value in content.items():
            if not value.is_floating_point():
                raise ValueError(f"{name!r} is {value.dtype}")
        return {name: value.float().numpy(force=True) for name, value in content.items()}, None
    except UserError:
        raise
    except Exception as error:  # unpickling a corrupted file can raise anything
        reason = one_line(str(error).partition("\n")[0]) or type(error).__name__
        raise UserError(
            f"{path}: corrupted, or holds more than floating-point tensors ({reason}), and was not "
            "loaded; save only model.state_dict() with torch.save"
        ) from error


def _read_safetensors(path: str, file: BinaryIO) -> tuple[Weights, str | None]:
    weights, metadata = decode_safetensors(file.read())
    digest = metadata.pop(_DIGEST, None)
    if digest is not None and digest != digest_of(metadata, weights):
        raise ValueError(f"corrupted, or changed by a program that kept its {_DIGEST}")
    for name, value in weights.items():
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise UserError(f"{path}: {name!r} is {value.dtype}; save floating-point tensors")
    return {name: value.astype(np.float32, copy=False) for name, value in weights.items()}, digest


def _model_config(weights: Weights, path: str) -> ModelConfig:
    def shape_of(name: str) -> tuple[int, ...]:
        if name not in weights or len(weights[name].shape) != 2:
            raise UserError(f"{path}: has no matrix {name}; the file is not from this model")
        return weights[name].shape

    indices = {match[1] for name in weights if (match := re.match(r"layers\.(\d+)\.", name))}
    vocab_size, hidden_dim = shape_of("embedding.weight")
    config = ModelConfig(
        vocab_size=vocab_size,
        block="plain",
        num_layers=max(1, len(indices)),
        hidden_dim=hidden_dim,
        key_dim=shape_of("layers.0.query_proj.weight")[0],
        value_dim=shape_of("layers.0.value_proj.weight")[0],
        num_heads=1,
        tie_embeddings=False,
    )
    try:
        validate(Config(model=config, train=TrainConfig(steps=1)))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return config
