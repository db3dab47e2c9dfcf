"""Conversion of parameters to and from PyTorch names and layouts.

Matrices are ``[out, in]``. A model with ``block="plain"`` has the names of the original PyTorch
project: ``embedding.weight``, ``layers.N.query_proj.weight``, ``lm_head.bias`` and so on; those of
the residual block follow the same scheme, and ``block="swiglu"`` has the names of
flash-linear-attention.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from simplernn_jax.config import ModelConfig
from simplernn_jax.errors import UserError
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

Path = tuple[Any, ...]
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


def _name(path: Path, block: str) -> str:
    modules = _FLA_MODULES if block == "swiglu" else _MODULES
    *words, last = (modules.get(word, str(word)) for word in path)
    return ".".join([*filter(None, words), _PARAMETERS.get(path[-1], last)])


def _to_torch(path: Path, value: np.ndarray, block: str) -> np.ndarray:
    if path[-1] == "weights" and block == "swiglu":
        return value.T[:, None, ::-1]  # the last weight multiplies the current token
    return value.T if path[-1] in ("kernel", "weights") else value


def _from_torch(path: Path, value: Any, block: str) -> Any:
    if path[-1] == "weights" and block == "swiglu":
        return value[:, 0, ::-1].T
    return value.T if path[-1] in ("kernel", "weights") else value
