"""Load `GLAForCausalLM` of flash-linear-attention from a folder in Hugging Face format.

The folder holds ``config.json`` and ``model.safetensors``, or the shards that
``model.safetensors.index.json`` lists. Nothing in it is executed. Names, defaults and the rule for
the MLP's width are those of github.com/fla-org/flash-linear-attention, `fla/models/gla`.
"""

import json
import math
import os
from typing import Any

from simplernn_jax.config import Config, ModelConfig, Scalar, TrainConfig, validate
from simplernn_jax.errors import UserError
from simplernn_jax.files import read_file
from simplernn_jax.models.language_model import LanguageModel
from simplernn_jax.models.mixers.token_mixer import complete_options
from simplernn_jax.models.pytorch_weights import model_from_weights, read_pytorch_weights

_CONFIG = "config.json"
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
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

_FIELDS: dict[str, tuple[str, Any]] = {
    "vocab_size": ("vocab_size", 32000),
    "num_layers": ("num_hidden_layers", 24),
    "hidden_dim": ("hidden_size", 2048),
    "num_heads": ("num_heads", 4),
    "tie_embeddings": ("tie_word_embeddings", False),
    "norm_epsilon": ("norm_eps", 1e-6),
}
"""Fields of `ModelConfig`, and the settings of the same meaning with their defaults."""


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
    try:
        config = _model_config(settings)
        validate(Config(model=config, train=TrainConfig(steps=1)))
    except (UserError, TypeError, ValueError, ArithmeticError) as error:
        raise UserError(f"{path}: {error}") from error
    weights: dict[str, Any] = {}
    for file in _weight_files(folder):
        weights |= read_pytorch_weights(file)
    if settings.get("fuse_norm") is False:
        weights = {n.replace(".g_norm.", ".g_norm_swish_gate."): x for n, x in weights.items()}
    if config.tie_embeddings:
        weights.pop("lm_head.weight", None)
    return model_from_weights(config, weights, folder)


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
        **{name: getattr(config, field) for field, (name, _) in _FIELDS.items()},
        # Widths are rounded down from these products.
        "expand_k": (config.key_dim + 0.5) / config.hidden_dim,
        "expand_v": (config.value_dim + 0.5) / config.hidden_dim,
        "intermediate_size": config.mlp_dim,
        "clamp_min": options["min_log_gate"] or None,
        "use_short_conv": options["short_convolution"] != 0,
        "conv_size": options["short_convolution"] or 4,
    }


def _read_json(path: str) -> dict[str, Any]:
    try:
        values = json.loads(read_file(path))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise UserError(f"{path}: cannot be read ({reason}); {_ADVICE}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: is not a JSON object; {_ADVICE}")
    return values


def _model_config(settings: dict[str, Any]) -> ModelConfig:
    """Translate the settings of fla's `GLAConfig`, with its defaults."""
    value = settings.get
    if (kind := value("model_type")) != "gla":
        raise UserError(f"model_type is {kind!r}; only 'gla' can be loaded")
    for name, supported in _SUPPORTED.items():
        if (found := value(name, supported)) != supported:
            raise UserError(f"{name} is {found!r}; only {supported!r} is supported")
    fields = {field: value(name, default) for field, (name, default) in _FIELDS.items()}
    if value("num_kv_heads") not in (None, fields["num_heads"]):
        raise UserError("num_kv_heads differs from num_heads, which is not supported")
    hidden = fields["hidden_dim"]
    if (mlp := value("intermediate_size")) is None:
        mlp = 256 * math.ceil(int(hidden * (value("hidden_ratio") or 4) * 2 / 3) / 256)
    options: dict[str, Scalar] = {}  # other than the defaults
    if (clamp_min := value("clamp_min")) is not None:
        if clamp_min >= 0:
            raise UserError(f"clamp_min is {clamp_min}; only negative values are supported")
        options["min_log_gate"] = float(clamp_min)
    if value("use_short_conv", False):
        options["short_convolution"] = value("conv_size", 4)
    return ModelConfig(
        block="swiglu",
        mixer="gla",
        key_dim=int(hidden * value("expand_k", 0.5)),
        value_dim=int(hidden * value("expand_v", 1.0)),
        mlp_dim=mlp,
        mixer_options=options,
        **fields,
    )


def _weight_files(folder: str) -> list[str]:
    """Return the files of the weights: one, or those that an index names."""
    single, index = os.path.join(folder, _WEIGHTS), os.path.join(folder, _INDEX)
    if os.path.lexists(single):
        return [single]
    if not os.path.lexists(index):
        raise UserError(
            f"{folder}: holds neither {_WEIGHTS} nor {_INDEX}; save the model as safetensors "
            "(`save_pretrained`)"
        )
    try:
        files = sorted(set(_read_json(index)["weight_map"].values()))
        if any(os.path.basename(file) != file for file in files):
            raise ValueError("a file is in another folder")
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{index}: is not an index of weights ({error}); {_ADVICE}") from error
    return [os.path.join(folder, file) for file in files]
