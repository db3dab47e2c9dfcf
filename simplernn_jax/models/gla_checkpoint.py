"""Load `GLAForCausalLM` of flash-linear-attention from a folder in Hugging Face format.

The folder holds ``config.json`` and ``model.safetensors``, or the shards that
``model.safetensors.index.json`` lists. Nothing in it is executed. Names, defaults and the rule for
the MLP's width are those of github.com/fla-org/flash-linear-attention, `fla/models/gla`.
"""

import json
import math
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from simplernn_jax.config import Config, ModelConfig, Scalar, TrainConfig, validate
from simplernn_jax.errors import UserError
from simplernn_jax.files import read_file
from simplernn_jax.models.language_model import LanguageModel
from simplernn_jax.models.mixers.token_mixer import complete_options
from simplernn_jax.models.named_weights import model_from_weights
from simplernn_jax.models.pytorch_weights import read_pytorch_weights

_CONFIG = "config.json"
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_HEAD = "lm_head.weight"
_ADVICE = "download the folder again"

_SUPPORTED: dict[str, Any] = {
    "hidden_act": "swish",
    "feature_map": None,
    "use_gk": True,
    "use_gv": False,
    "use_output_gate": True,
    "elementwise_affine": True,
    "attn": None,
    "attnres_block_size": None,
}
"""Settings with one supported value, which is also their default."""


def load_gla_checkpoint(folder: str) -> LanguageModel:
    """Load a model of flash-linear-attention with ``model_type: gla``.

    Args:
      folder: holds ``config.json`` and the weights as safetensors, in one file or several, of any
        floating-point dtype.

    Returns:
      A `LanguageModel` with ``block="swiglu"`` and ``mixer="gla"`` in float32 that reproduces the
      original's logits.

    Raises:
      UserError: a file is missing or corrupted; or a setting, or a tensor's name or shape, is not
        one of this architecture: names the file and the setting or tensor.
    """
    path = os.path.join(folder, _CONFIG)
    settings = _read_json(path)
    config = _model_config(settings, path)
    weights: dict[str, np.ndarray] = {}
    for file, names in _files(folder):
        some = read_pytorch_weights(file)
        for name in some.keys() ^ (names or some.keys()):
            problem = "missing" if name in (names or ()) else f"not listed in {_INDEX}"
            raise UserError(f"{file}: {name} is {problem}; {_ADVICE}")
        weights |= some
    if not _value(settings, path, "fuse_norm", True, bool):
        weights = {n.replace(".g_norm.", ".g_norm_swish_gate."): x for n, x in weights.items()}
    head = weights.pop(_HEAD, None) if config.tie_embeddings else None
    model = model_from_weights(config, weights, folder)
    if head is not None and not np.array_equal(head, weights["model.embeddings.weight"]):
        raise UserError(
            f"{folder}: {_HEAD} differs from model.embeddings.weight, and {_CONFIG} has "
            "tie_word_embeddings true; set it to false there"
        )
    return model


def is_hugging_face_folder(folder: str) -> bool:
    """Return whether `folder` has a ``config.json`` of Hugging Face: one with a ``model_type``.

    `load_gla_checkpoint` raises if it is not ``gla``.
    """
    try:
        return "model_type" in _read_json(os.path.join(folder, _CONFIG))
    except UserError:
        return False


def is_fla(config: ModelConfig) -> bool:
    """Return whether flash-linear-attention has the architecture."""
    return config.block == "swiglu" and {*config.mixers} == {"gla"}


def to_fla_config(config: ModelConfig) -> dict[str, Any]:
    """Return the ``config.json`` of flash-linear-attention for one of its models (`is_fla`)."""
    options = complete_options("gla", config).mixer_options
    return {
        "model_type": "gla",
        "architectures": ["GLAForCausalLM"],
        **{name: value for name, value in _SUPPORTED.items() if value is not None},
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.hidden_dim,
        # Widths are rounded down from these products.
        "expand_k": (config.key_dim + 0.5) / config.hidden_dim,
        "expand_v": (config.value_dim + 0.5) / config.hidden_dim,
        "num_heads": config.num_heads,
        "intermediate_size": config.mlp_dim,
        "tie_word_embeddings": config.tie_embeddings,
        "norm_eps": config.norm_epsilon,
        "clamp_min": options["min_log_gate"] or None,
        "use_short_conv": options["short_convolution"] != 0,
        "conv_size": options["short_convolution"] or 4,
    }


def _read_json(path: str) -> dict[str, Any]:
    try:
        values = json.loads(read_file(path))
    except FileNotFoundError as error:
        raise UserError(
            f"{path}: no such file; specify the folder of a GLAForCausalLM, with {_CONFIG} and "
            f"{_WEIGHTS} (`save_pretrained` writes both)"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise UserError(f"{path}: cannot be read ({reason}); {_ADVICE}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: is not a JSON object; {_ADVICE}")
    return values


def _model_config(settings: dict[str, Any], path: str) -> ModelConfig:
    """Translate the settings of fla's `GLAConfig`, with its defaults."""

    def value(name: str, default: Any, *kinds: type) -> Any:
        return _value(settings, path, name, default, *kinds)

    if (kind := settings.get("model_type")) != "gla":
        raise UserError(f"{path}: model_type is {kind!r}; only 'gla' can be loaded")
    heads = value("num_heads", 4, int)
    for name, supported in {**_SUPPORTED, "num_kv_heads": heads}.items():
        found = settings.get(name, supported)
        if found != supported and not (name == "num_kv_heads" and found is None):
            raise UserError(
                f"{path}: {name} is {_shown(found)}; only {_shown(supported)} is supported"
            )
    hidden = value("hidden_size", 2048, int)
    mlp = value("intermediate_size", None, int)
    if mlp is None:
        ratio = value("hidden_ratio", None, int, float)
        mlp = 256 * math.ceil(int(hidden * (4 if ratio is None else ratio) * 2 / 3) / 256)
    clamp_min = value("clamp_min", None, int, float)
    if clamp_min is not None and clamp_min >= 0:
        raise UserError(f"{path}: clamp_min is {clamp_min}; only negative values are supported")
    options: dict[str, Scalar] = {}  # other than the defaults
    if clamp_min is not None:
        options["min_log_gate"] = float(clamp_min)
    if value("use_short_conv", False, bool):
        options["short_convolution"] = value("conv_size", 4, int)
    config = ModelConfig(
        block="swiglu",
        mixer="gla",
        vocab_size=value("vocab_size", 32000, int),
        num_layers=value("num_hidden_layers", 24, int),
        hidden_dim=hidden,
        key_dim=int(hidden * value("expand_k", 0.5, int, float)),
        value_dim=int(hidden * value("expand_v", 1.0, int, float)),
        num_heads=heads,
        mlp_dim=mlp,
        tie_embeddings=value("tie_word_embeddings", False, bool),
        norm_epsilon=float(value("norm_eps", 1e-6, int, float)),
        mixer_options=options,
    )
    try:
        validate(Config(model=config, train=TrainConfig(steps=1)))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return config


def _value(settings: dict[str, Any], path: str, name: str, default: Any, *kinds: type) -> Any:
    """Return a setting; null only where the default is None."""
    found = settings.get(name, default)
    if found is None and default is None:
        return None
    if type(found) not in kinds or (bool not in kinds and not abs(found) < 2**31):
        expected = " or ".join(kind.__name__ for kind in kinds)
        expected += "" if bool in kinds else " of magnitude below 2**31"
        raise UserError(f"{path}: {name} is {_shown(found)}; expected {expected}")
    return found


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _files(folder: str) -> Iterator[tuple[str, set[str] | None]]:
    """Yield each file of weights, and the names it must hold if there is an index."""
    single, index = os.path.join(folder, _WEIGHTS), os.path.join(folder, _INDEX)
    if os.path.lexists(single):
        yield single, None
        return
    if not os.path.lexists(index):
        raise UserError(
            f"{folder}: holds neither {_WEIGHTS} nor {_INDEX}; save the model as safetensors "
            "(`save_pretrained`)"
        )
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: has no weight_map; {_ADVICE}")
    names: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        # A file of this folder: no path.
        if not isinstance(file, str) or os.path.basename(file) != file or file in ("", ".", ".."):
            raise UserError(f"{index}: {name} is in {_shown(file)}; expected the name of a file")
        names.setdefault(file, set()).add(name)
    for file, held in names.items():
        path = os.path.join(folder, file)
        if "\0" in file or not os.path.lexists(path):
            raise UserError(
                f"{path}: no such file; {_INDEX} lists {len(held)} tensors in it, such as "
                f"{min(held)}; {_ADVICE}"
            )
        if not file.endswith(".safetensors"):
            raise UserError(
                f"{index}: {min(held)} is in {_shown(file)}; expected a .safetensors file"
            )
    for file, held in names.items():
        yield os.path.join(folder, file), held
