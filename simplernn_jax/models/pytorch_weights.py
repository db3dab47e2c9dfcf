"""Weights under PyTorch's names: conversion from and to a model, and their files.

Matrices are ``[out, in]``. A model with ``block="plain"`` has the names of the original PyTorch
project: ``embedding.weight``, ``layers.N.query_proj.weight``, ``lm_head.bias`` and so on; those of
the residual block follow the same scheme, and ``block="swiglu"`` has the names of
flash-linear-attention. Files are ``.safetensors`` or ``.pt``; nothing in them is executed.
"""

import hashlib
import json
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import nnx

from simplernn_jax.config import Config, ModelConfig, TrainConfig, validate
from simplernn_jax.devices import check_memory
from simplernn_jax.errors import UserError, one_line
from simplernn_jax.files import open_file
from simplernn_jax.models.language_model import LanguageModel, abstract_model

Weights = Mapping[str, Any]
"""Name of each parameter and its value, an array of NumPy or JAX."""

_MODULES = {"head": "lm_head", "final_scale": "final_norm.weight", "mixer": "", "cell": ""}
"""Names of modules that differ; those without a name are left out."""

_FLA_MODULES = {
    "embedding": "model.embeddings",
    "final_scale": "model.norm.weight",
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
    "decay_proj": "a_proj",
    "strength_proj": "b_proj",
    "out_proj": "o_proj",
    "head_norm": "g_norm_swish_gate",
    "convolutions": "",
    "query": "q_conv1d",
    "key": "k_conv1d",
    "value": "v_conv1d",
    "mlp_gate": "mlp.gate_proj",
    "mlp_up": "mlp.up_proj",
    "mlp_down": "mlp.down_proj",
}
_PARAMETERS = dict.fromkeys(("kernel", "embedding", "weights", "scale"), "weight")

_ADVICE = "export the file again"
_METADATA = {"format": "pt"}
_DIGEST = "simplernn_jax.sha256"
"""Metadata key of the digest of `encode_weights`; other programs drop it when they write a file."""

_DTYPES: dict[str, Any] = {
    **{"BOOL": np.bool_, "U8": np.uint8},
    **{"I8": np.int8, "I16": np.int16, "I32": np.int32, "I64": np.int64},
    **{"BF16": jnp.bfloat16, "F16": np.float16, "F32": np.float32, "F64": np.float64},
}
"""`safetensors.numpy` has no bfloat16."""

_ParamPath = tuple[Any, ...]
"""Where a parameter is in `nnx.state`, such as ``("head", "kernel")``."""


def named_weights(model: LanguageModel) -> dict[str, np.ndarray]:
    """Return the parameters of `model`, float32 arrays by name."""
    block = model.config.block
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    named = {
        _name(path, block): np.ascontiguousarray(_to_torch(path, np.asarray(param[...]), block))
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
    block = config.block
    graph, params = abstract_model(config)
    by_name = {_name(path, block): (path, param) for path, param in nnx.to_flat_state(params)}
    missing = [name for name in by_name if name not in weights]
    unexpected = [name for name in weights if name not in by_name]
    for kind, names in (("missing", missing), ("unexpected", unexpected)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(f"{where}: {names[0]}{more} {kind}; use the weights of one model")
    for name, (path, param) in by_name.items():
        found = weights[name].shape
        expected = _to_torch(path, np.broadcast_to(0, param.shape), block).shape
        if found != expected:
            raise UserError(
                f"{where}: {name} has shape {list(found)}; expected {list(expected)} as for the "
                "other weights or the configuration; use the files of one model"
            )
        param.set_value(jnp.asarray(_from_torch(path, weights[name], block), jnp.float32))
    return nnx.merge(graph, params)


def _name(path: _ParamPath, block: str) -> str:
    modules = _FLA_MODULES if block == "swiglu" else _MODULES
    *words, last = (modules.get(word, str(word)) for word in path)
    return ".".join([*filter(None, words), _PARAMETERS.get(path[-1], last)])


def _to_torch(path: _ParamPath, value: np.ndarray, block: str) -> np.ndarray:
    if path[-1] == "weights" and block == "swiglu":
        return value.T[:, None, ::-1]  # the last weight multiplies the current token
    return value.T if path[-1] in ("kernel", "weights") else value


def _from_torch(path: _ParamPath, value: Any, block: str) -> Any:
    if path[-1] == "weights" and block == "swiglu":
        return value[:, 0, ::-1].T
    return value.T if path[-1] in ("kernel", "weights") else value


def load_pytorch_weights(path: str) -> LanguageModel:
    """Load weights of the original implementation; infer the sizes from their shapes.

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


def decode_safetensors(content: bytes) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Return the arrays by name, and the metadata.

    Raises:
      ValueError: `content` is corrupted or has arrays of an unsupported dtype, such as float8.
    """
    arrays = {}
    try:
        parts = safetensors.deserialize(content)
    except safetensors.SafetensorError as error:
        raise ValueError(str(error)) from error
    for name, part in parts:
        if part["dtype"] not in _DTYPES:
            raise ValueError(f"{name!r} has the unsupported dtype {part['dtype']}")
        arrays[name] = np.frombuffer(part["data"], _DTYPES[part["dtype"]]).reshape(part["shape"])
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return arrays, header.get("__metadata__") or {}


def digest_of(header: Mapping[str, Any], arrays: Mapping[str, Any]) -> str:
    """SHA-256 hex over a JSON-able header and the names, dtypes, shapes and bytes of arrays."""
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name, array in sorted(arrays.items()):
        array = np.asarray(array)
        digest.update(f"\n{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
