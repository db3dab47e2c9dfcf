"""What a run trains: all parameters, low-rank updates of them, or the initial state.

``params`` of a train state are always the parameters of the whole model. ``tuned`` has the
other state of fine-tuning, by ``train.tune``: nothing (``full``); a learned state of one sequence,
``initial`` (``state``); or the kernels before training, ``base``, and the factors ``a`` and ``b``
of their updates (``lora:RANK``).
"""

import dataclasses
import os
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from simplernn_jax.array_types import ModelState
from simplernn_jax.checkpoint.folder import (
    BEST,
    CheckpointFolder,
    choose_checkpoint,
    read_texts,
    read_tree,
)
from simplernn_jax.config import Config
from simplernn_jax.data.tokenizer import Tokenizer
from simplernn_jax.errors import UserError
from simplernn_jax.inference import generate, save_state
from simplernn_jax.inference.adapter import add_low_rank, init_low_rank, save_adapter, split_kernels
from simplernn_jax.inference.state import DecoderState, empty_state
from simplernn_jax.models import LanguageModel
from simplernn_jax.models.language_model import abstract_model

LEARNING_RATES = {"state": 10.0, "lora": 0.015}
"""Defaults of ``optimizer.learning_rate``."""


def init_tuned(
    config: Config, graph: nnx.GraphDef[LanguageModel], params: nnx.State
) -> dict[str, Any]:
    """Return ``tuned`` before the first step, for these parameters.

    Raises:
      UserError: a layer has no recurrent state to learn, or the rank is too large.
    """
    kind, _, rank = config.train.tune.partition(":")
    if kind == "full":
        return {}
    if kind == "lora":
        key = jax.random.fold_in(jax.random.key(config.train.seed), 1)
        kernels, _ = split_kernels(params)
        return {"base": kernels, **init_low_rank(kernels, int(rank), key)}
    initial = nnx.merge(graph, params).initial_state(1)
    if not all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(initial)):
        raise UserError(
            f"config.train.tune=state with config.model.mixer={config.model.mixer!r} is invalid: "
            "a mixer has no recurrent state, but a cache; use lora:8"
        )
    return {"initial": initial}


def trained_part(params: Any, tuned: dict[str, Any]) -> Any:
    """Return what the optimizer updates."""
    return {name: part for name, part in tuned.items() if name != "base"} if tuned else params


def with_trained(params: Any, tuned: dict[str, Any], trained: Any) -> tuple[Any, dict[str, Any]]:
    """Return ``params`` and ``tuned`` after `trained_part` has become `trained`."""
    if not tuned:
        return trained, tuned
    if "base" in tuned:
        params = add_low_rank(params, tuned["base"], **trained)
    return params, tuned | trained


def stop_gradients(tune: str, params: Any) -> Any:
    """Return `params` without gradients of those on which nothing that is trained depends."""
    if tune == "full":
        return params
    if tune == "state":
        return jax.lax.stop_gradient(params)
    kernels, rest = split_kernels(params)
    return nnx.merge_state(jax.lax.stop_gradient(rest), kernels)


def start_state(model: LanguageModel, tokenizer: Tokenizer, initial: ModelState) -> DecoderState:
    """Return the decoder state after BOS from the learned state."""
    state = dataclasses.replace(empty_state(model, 1), layers=initial)
    return generate(model, [[tokenizer.bos_id]], max_new_tokens=0, state=state).state


def read_tuned(workdir: str, checkpoint: str | int = BEST) -> tuple[Config, nnx.State, Any]:
    """Read configuration, parameters and ``tuned`` of a checkpoint; errors as of `load_model`."""
    step, _ = choose_checkpoint(workdir, checkpoint)
    folder = CheckpointFolder(workdir).step_path(step)
    config, _ = read_texts(folder)
    graph, params = abstract_model(config.model)
    tuned = jax.eval_shape(partial(init_tuned, config, graph), params)
    saved = read_tree(folder, {"params": params, "tuned": tuned}, partial=True)
    return config, saved["params"], saved["tuned"]


def save_tuned(workdir: str, tokenizer: Tokenizer) -> str:
    """Write what the best checkpoint has learned to a file of `workdir`; return its path.

    It is ``state.safetensors``, a saved decoder state, or ``adapter.safetensors``.
    """
    config, params, tuned = read_tuned(workdir)
    graph, _ = abstract_model(config.model)
    if base := tuned.pop("base", None):
        path = os.path.join(workdir, "adapter.safetensors")
        save_adapter(path, nnx.merge(graph, nnx.merge_state(params, base)), tuned)
    else:
        path, model = os.path.join(workdir, "state.safetensors"), nnx.merge(graph, params)
        save_state(path, start_state(model, tokenizer, tuned["initial"]), model, tokenizer)
    return path
