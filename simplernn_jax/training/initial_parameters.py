"""Parameters and tokenizer that a run starts from: ``train.init_from``."""

import dataclasses
import os
from typing import Any

import jax
import numpy as np
from flax import nnx

from simplernn_jax import config as config_lib
from simplernn_jax.checkpoint.checkpointer import read_config
from simplernn_jax.checkpoint.choice import BEST, choose_checkpoint
from simplernn_jax.checkpoint.contents import read_tree
from simplernn_jax.checkpoint.folder import CheckpointFolder
from simplernn_jax.config import Config, ModelConfig
from simplernn_jax.data.bpe import PREFIX
from simplernn_jax.data.tokenizer import Tokenizer
from simplernn_jax.data.tokenizer_loading import load_tokenizer, tokenizer_from_json
from simplernn_jax.errors import UserError
from simplernn_jax.inference.exported_folder import is_exported, load_exported, read_run
from simplernn_jax.models import LanguageModel, load_gla_checkpoint
from simplernn_jax.models.gla_checkpoint import is_hugging_face_folder
from simplernn_jax.models.pytorch_weights import load_pytorch_weights
from simplernn_jax.parallel.distributed import broadcast_from_coordinator, is_coordinator

_FREE_FIELDS = ("dropout", "precision", "state_precision", "vocab_size")
"""Fields of the model in which fine-tuning may differ; the vocabulary is compared as arrays."""

_BUILT_IN_TOKENIZERS = ("byte", "char")

_RESIDUAL_FIELDS = ("mlp_dim", "tie_embeddings", "attention_context")
"""Fields without an effect on plain layers."""


def initial_tokenizer(config: Config) -> Tokenizer | None:
    """Return the tokenizer of the run or export in ``init_from``, after comparing configurations.

    Returns None if ``init_from`` has weights alone.

    Raises:
      UserError: there is no model, or its configuration or tokenizer differs.
    """
    path = config.train.init_from
    if is_exported(path):
        initial, tokenizer, _ = read_run(path)
    elif _is_weights_only(path):
        return None
    elif not CheckpointFolder(path).steps():
        raise UserError(
            f"--config.train.init_from: no checkpoint in {path}; name the folder of a run or export"
        )
    else:
        initial, tokenizer_json, _ = read_config(path, BEST)
        tokenizer = tokenizer_from_json(tokenizer_json)
    _check_same_model(config, initial.model)
    _check_same_tokenizer(config, initial, tokenizer)
    return tokenizer


def initial_parameters(config: Config, abstract: nnx.State, shardings: Any) -> nnx.State:
    """Load the parameters in ``init_from``; without `shardings`, onto the default device.

    Raises:
      UserError: they cannot be read, or are those of another model.
    """
    path = config.train.init_from
    model = _load(path)
    if model is None:
        # The run may go on meanwhile: all processes read the checkpoint that process 0 sees.
        step = choose_checkpoint(path).step if is_coordinator() else 0
        step_path = CheckpointFolder(path).step_path(broadcast_from_coordinator(step))
        tree = {"params": abstract}
        placed = None if shardings is None else {"params": shardings}
        return read_tree(step_path, tree, placed, partial=True)["params"]
    _check_same_model(config, model.config)
    params = nnx.state(model, nnx.Param)
    for wanted, found in zip(jax.tree.leaves(abstract), jax.tree.leaves(params), strict=True):
        if wanted.shape != found.shape:
            raise UserError(
                f"{_where(config)} has an array {list(found.shape)} where the model has "
                f"{list(wanted.shape)}; use the same --config.model.vocab_size"
            )
    if shardings is None:
        return params

    def place(value: jax.Array, sharding: Any) -> jax.Array:
        whole = np.asarray(value)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    return jax.tree.map(place, params, shardings)


def _load(path: str) -> LanguageModel | None:
    """Load an export or weights; None if `path` is another folder, such as that of a run."""
    if is_exported(path):
        return load_exported(path)[0]
    if not _is_weights_only(path):
        return None
    return load_pytorch_weights(path) if os.path.isfile(path) else load_gla_checkpoint(path)


def _is_weights_only(path: str) -> bool:
    return os.path.isfile(path) or is_hugging_face_folder(path)


def _check_same_model(config: Config, initial: ModelConfig) -> None:
    free = _FREE_FIELDS + (_RESIDUAL_FIELDS if initial.block == "plain" else ())
    same = {name: getattr(config.model, name) for name in free}
    fields = config_lib.differing_fields(config.model, dataclasses.replace(initial, **same))
    if fields:
        raise UserError(
            f"{_where(config)} has a different model: {'; '.join(fields)}; use the same values"
        )


def _check_same_tokenizer(config: Config, initial: Config, tokenizer: Tokenizer) -> None:
    wanted, found = config.data.tokenizer, initial.data.tokenizer
    if any(spec in _BUILT_IN_TOKENIZERS or spec.startswith(PREFIX) for spec in (wanted, found)):
        is_same = wanted == found
    else:  # a path differs between machines, and an export has only its last part
        is_same = load_tokenizer(wanted, None).to_json() == tokenizer.to_json()
    if not is_same:
        raise UserError(
            f"{_where(config)} has the tokenizer {found}; use the same with --config.data.tokenizer"
        )


def _where(config: Config) -> str:
    return f"--config.train.init_from={config.train.init_from}"
