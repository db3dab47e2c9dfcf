"""Parameters and tokenizer that a run starts from: ``train.init_from``."""

import dataclasses
import os
from typing import Any

import jax
import numpy as np
from flax import nnx

from simplernn_jax import config as config_lib
from simplernn_jax.checkpoint.checkpointer import read_config
from simplernn_jax.checkpoint.contents import read_tree
from simplernn_jax.checkpoint.folder import BEST, CheckpointFolder, choose_checkpoint
from simplernn_jax.config import Config
from simplernn_jax.data.bpe import PREFIX
from simplernn_jax.data.tokenizer import Tokenizer
from simplernn_jax.data.tokenizer_loading import load_tokenizer, tokenizer_from_json
from simplernn_jax.errors import UserError
from simplernn_jax.inference.loading import is_exported, load_exported, read_run
from simplernn_jax.models import LanguageModel, load_gla_checkpoint
from simplernn_jax.models.gla_checkpoint import is_hugging_face_folder
from simplernn_jax.models.pytorch_weights import load_pytorch_weights
from simplernn_jax.parallel.distributed import broadcast_from_coordinator, is_coordinator

_FREE_FIELDS = ("dropout", "precision", "state_precision")
"""Fields of the model in which fine-tuning may differ."""

_BUILT_IN_TOKENIZERS = ("byte", "char")

_RESIDUAL_FIELDS = ("mlp_dim", "tie_embeddings", "attention_context")
"""Fields without an effect on plain layers."""


def with_initial_model(config: Config) -> tuple[Config, Tokenizer | None]:
    """Return `config` `filled_from` the model in ``init_from``, and the tokenizer of that model.

    The tokenizer is None if ``init_from`` has weights alone.

    Raises:
      UserError: there is no model, or the configuration gives another one or another tokenizer.
    """
    path, tokenizer = config.train.init_from, None
    if is_exported(path):
        initial, tokenizer, _ = read_run(path)
    elif (weights := _load(path)) is not None:
        initial = dataclasses.replace(config, model=weights.config)
    elif not CheckpointFolder(path).steps():
        raise UserError(
            f"--config.train.init_from: no checkpoint in {path}; name the folder of a run or export"
        )
    else:
        initial, tokenizer_json, _ = read_config(path, BEST)
        tokenizer = tokenizer_from_json(tokenizer_json)
    filled = filled_from(config, initial)
    # The vocabulary is compared as arrays.
    free = ("vocab_size", *(_RESIDUAL_FIELDS if initial.model.block == "plain" else ()))
    same = {name: getattr(filled.model, name) for name in (*_FREE_FIELDS, *free)}
    model = dataclasses.replace(initial.model, **same)
    if fields := config_lib.differing_fields(filled.model, model):
        raise UserError(
            f"{_where(config)} has a different model: {'; '.join(fields)}; omit these fields"
        )
    if tokenizer is not None and config.data.is_given("tokenizer"):
        _check_same_tokenizer(config, initial, tokenizer)
    return filled, tokenizer


def filled_from(config: Config, initial: Config) -> Config:
    """Return `config` with the model and tokenizer of `initial` in fields that it leaves out."""
    model, data = config.model, config.data
    names = {field.name for field in dataclasses.fields(model)}.difference(_FREE_FIELDS)
    missing = {name: getattr(initial.model, name) for name in names if not model.is_given(name)}
    if not data.is_given("tokenizer"):
        data = dataclasses.replace(data, tokenizer=initial.data.tokenizer)
    filled = dataclasses.replace(config, model=dataclasses.replace(model, **missing), data=data)
    config_lib.validate(filled)
    return filled


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
    if os.path.isfile(path):
        return load_pytorch_weights(path)
    return load_gla_checkpoint(path) if is_hugging_face_folder(path) else None


def _check_same_tokenizer(config: Config, initial: Config, tokenizer: Tokenizer) -> None:
    wanted, found = config.data.tokenizer, initial.data.tokenizer
    if any(spec in _BUILT_IN_TOKENIZERS or spec.startswith(PREFIX) for spec in (wanted, found)):
        is_same = wanted == found
    else:  # a path differs between machines, and an export has only its last part
        is_same = load_tokenizer(wanted, None).to_json() == tokenizer.to_json()
    if not is_same:
        raise UserError(f"{_where(config)} has the tokenizer {found}; omit --config.data.tokenizer")


def _where(config: Config) -> str:
    return f"--config.train.init_from={config.train.init_from}"
