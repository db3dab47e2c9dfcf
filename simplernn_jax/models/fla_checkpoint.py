"""Load models of flash-linear-attention (fla) from a folder in Hugging Face format.

The folder holds ``config.json`` and ``model.safetensors``, or the shards that
``model.safetensors.index.json`` lists. Nothing in it is executed. Names, defaults and the rule for
the MLP's width are those of github.com/fla-org/flash-linear-attention, `fla/models`.
"""

import json
import math
import os
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from simplernn_jax.config import Config, ModelConfig, Scalar, TrainConfig, validate
from simplernn_jax.errors import UserError
from simplernn_jax.files import read_file
from simplernn_jax.models.language_model import LanguageModel
from simplernn_jax.models.mixers.hgrn2 import NO_BOUND
from simplernn_jax.models.mixers.token_mixer import complete_options, find_mixer
from simplernn_jax.models.pytorch_weights import model_from_weights, read_pytorch_weights

_CONFIG = "config.json"
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_ADVICE = "download the folder again"

_MIXERS = {
    "gla": "gla",
    "retnet": "retnet",
    "hgrn2": "hgrn2",
    "mamba2": "mamba2",
    "gated_deltanet": "gated_delta_net",
}
"""By ``model_type``."""

_FIELDS = {
    "vocab_size": "vocab_size",
    "num_layers": "num_hidden_layers",
    "hidden_dim": "hidden_size",
    "num_heads": "num_heads",
    "tie_embeddings": "tie_word_embeddings",
    "norm_epsilon": "norm_eps",
}
"""Fields of `ModelConfig`, and the settings of the same meaning."""

_DEFAULTS: dict[str, Any] = {
    **{"vocab_size": 32000, "num_hidden_layers": 24, "hidden_size": 2048, "num_heads": 4},
    **{"tie_word_embeddings": False, "norm_eps": 1e-6, "expand_k": 0.5, "expand_v": 1.0},
    **{"hidden_ratio": 4, "use_short_conv": False, "conv_size": 4},
}
_OTHER_DEFAULTS: dict[str, dict[str, Any]] = {
    "gla": {},
    "retnet": {"num_heads": 8, "expand_k": 1.0, "expand_v": 2.0, "hidden_ratio": 2},
    "hgrn2": {"num_heads": None, "expand_ratio": 128, "use_lower_bound": True},
    "mamba2": {
        **{"num_hidden_layers": 48, "norm_eps": 1e-5, "expand": 2, "head_dim": 64},
        **{"state_size": 128, "conv_kernel": 4, "num_heads": None},
    },
    "gated_deltanet": {
        **{"num_hidden_layers": 21, "num_heads": 6, "head_dim": 256, "expand_v": 2.0},
        **{"use_short_conv": True, "allow_neg_eigval": False},
    },
}

_BLOCK: dict[str, Any] = {"hidden_act": "swish", "attn": None, "attnres_block_size": None}
_LAYER: dict[str, Any] = {"feature_map": None, "use_output_gate": True, "elementwise_affine": True}
_SUPPORTED: dict[str, dict[str, Any]] = {
    "gla": _BLOCK | _LAYER | {"use_gk": True, "use_gv": False},
    "retnet": _BLOCK | _LAYER,
    "hgrn2": _BLOCK | {"elementwise_affine": True},
    "mamba2": {
        **{"hidden_act": "silu", "n_groups": 1, "use_bias": False, "use_conv_bias": True},
        **{"D_has_hdim": False, "rmsnorm": True, "norm_before_gate": False},
        "dt_limit": [0.0, math.inf],
    },
    "gated_deltanet": _BLOCK | {"use_gate": True},
}
"""Settings with one supported value, which is also their default."""


def load_fla_checkpoint(folder: str) -> LanguageModel:
    """Load a model of flash-linear-attention: its ``model_type`` is one of `_MIXERS`.

    Args:
      folder: holds ``config.json`` and the weights as safetensors, in one file or several, of any
        floating-point dtype.

    Returns:
      A `LanguageModel` with ``block="swiglu"`` in float32 that reproduces the original's logits.

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
    if translate := _TRANSLATIONS.get(settings["model_type"]):
        weights = translate(weights, config, settings)
    weights = {_NORM.sub(".g_norm_swish_gate.", name): x for name, x in weights.items()}
    if config.tie_embeddings:
        weights.pop("lm_head.weight", None)
    return model_from_weights(config, weights, folder)


def is_hugging_face_folder(folder: str) -> bool:
    """Return whether `folder` has a ``config.json`` of Hugging Face: one with a ``model_type``.

    `load_fla_checkpoint` raises if it cannot load this type.
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
        **{name: value for name, value in _SUPPORTED["gla"].items() if value is not None},
        **{name: getattr(config, field) for field, name in _FIELDS.items()},
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
    """Translate the settings of one of fla's configurations, with its defaults."""
    if (kind := settings.get("model_type")) not in _MIXERS:
        raise UserError(f"model_type is {kind!r}; only {', '.join(_MIXERS)} can be loaded")
    for name, supported in _SUPPORTED[kind].items():
        if (found := settings.get(name, supported)) != supported:
            raise UserError(f"{name} is {found!r}; only {supported!r} is supported")
    settings = _DEFAULTS | _OTHER_DEFAULTS[kind] | settings
    hidden = settings["hidden_size"]
    options: dict[str, Scalar] = {}  # other than the defaults
    if kind == "gla" and (clamp_min := settings.get("clamp_min")) is not None:
        if clamp_min >= 0:
            raise UserError(f"clamp_min is {clamp_min}; only negative values are supported")
        options["min_log_gate"] = float(clamp_min)
    keys = int(hidden * settings["expand_k"])
    values = int(hidden * settings["expand_v"])
    heads = settings["num_heads"]
    if kind == "hgrn2":
        keys = values = hidden
        if (ratio := settings["expand_ratio"]) is not None:
            heads = hidden // ratio
    elif kind == "mamba2":
        values = int(settings["expand"] * hidden)
        heads = values // settings["head_dim"]
        keys = heads * settings["state_size"]
        if settings["num_heads"] not in (None, 0, heads) or values % settings["head_dim"]:
            raise UserError(f"head_dim and num_heads do not fit {values}, expand * hidden_size")
    elif kind == "gated_deltanet":
        keys = heads * settings["head_dim"]
        values = heads * int(settings["head_dim"] * settings["expand_v"])
        if settings["allow_neg_eigval"]:
            options["negative_eigenvalues"] = True
    for name in ("num_kv_heads", "num_v_heads"):
        if settings.get(name) not in (None, heads):
            raise UserError(f"{name} differs from num_heads, which is not supported")
    mlp: int
    if kind == "mamba2":
        mlp, width = 0, settings["conv_kernel"]
    else:
        # fla's RetNet ignores the setting.
        has_convolutions = settings["use_short_conv"] and kind != "retnet"
        width = settings["conv_size"] if has_convolutions else 0
        by_rule = 256 * math.ceil(int(hidden * (settings["hidden_ratio"] or 4) * 2 / 3) / 256)
        found = settings.get("intermediate_size")
        mlp = by_rule if found is None else found
    if width != find_mixer(_MIXERS[kind]).options["short_convolution"]:  # type: ignore[index]
        options["short_convolution"] = width
    return ModelConfig(
        block="swiglu",
        mixer=_MIXERS[kind],
        key_dim=keys,
        value_dim=values,
        mlp_dim=mlp,
        mixer_options=options,
        **{field: settings[name] for field, name in _FIELDS.items()} | {"num_heads": heads},
    )


_NORM = re.compile(r"(?<=\.attn)\.(g_norm|o_norm)\.")
"""Names of the heads' norm that differ from most of GLA's."""

_HGRN2 = {"f_proj": "k_proj", "i_proj": "v_proj", "f_conv1d": "k_conv1d", "i_conv1d": "v_conv1d"}


def _translate_hgrn2(
    weights: dict[str, Any], config: ModelConfig, settings: dict[str, Any]
) -> dict[str, Any]:
    """Name the projections as GLA's, and compute each layer's lower bounds."""
    bounds = np.zeros((config.num_layers, config.key_dim))
    if settings.get("use_lower_bound", True) and "model.lower_bounds" in weights:
        logits = np.asarray(weights.pop("model.lower_bounds"), np.float64)
        shares = np.exp(logits - logits.max(axis=0))
        shares /= shares.sum(axis=0)
        bounds = np.cumsum(shares, axis=0) - shares[:1]
    bounds = np.clip(bounds, 1e-30, 1 - 1e-7)
    logits = np.maximum(np.log(bounds) - np.log1p(-bounds), NO_BOUND)
    renamed = {
        ".".join(_HGRN2.get(word, word) for word in name.split(".")): array
        for name, array in weights.items()
    }
    named = {f"model.layers.{i}.attn.lower_bound": bound for i, bound in enumerate(logits)}
    return renamed | named


def _translate_mamba2(
    weights: dict[str, Any], config: ModelConfig, settings: dict[str, Any]
) -> dict[str, Any]:
    """Name the layers as GLA's, and cut what fla fuses."""
    values, state = config.value_dim, config.key_dim // config.num_heads
    parts = {
        "in_proj": (("g", values), ("v", values), ("k", state), ("q", state), ("dt", None)),
        "conv1d": (("v", values), ("k", state), ("q", None)),
    }
    renamed: dict[str, Any] = {}
    for name, array in weights.items():
        name = name.replace("backbone.norm_f.", "model.norm.").replace("backbone.", "model.")
        name = re.sub(r"^(model\.layers\.\d+)\.norm\.", r"\1.attn_norm.", name)
        name = name.replace(".mixer.", ".attn.").replace(".attn.out_proj.", ".attn.o_proj.")
        *module, fused, parameter = name.split(".")
        if fused not in parts:
            renamed[name] = array
            continue
        start = 0
        for part, size in parts[fused]:
            end = None if size is None else start + size
            layer = f"{part}_{'proj' if fused == 'in_proj' else fused}"
            renamed[".".join([*module, layer, parameter])] = array[start:end]
            start = end or 0
    return renamed


_Translation = Callable[[dict[str, Any], ModelConfig, dict[str, Any]], dict[str, Any]]
_TRANSLATIONS: dict[str, _Translation] = {"hgrn2": _translate_hgrn2, "mamba2": _translate_mamba2}


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
