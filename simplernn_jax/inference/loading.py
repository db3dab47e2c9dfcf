"""Loading of a trained model from the workdir of its run, or from its export.

Exports that can be loaded are ``safetensors`` and ``huggingface``: ``model.safetensors`` holds the
parameters (`models.pytorch_weights`), ``simplernn.json`` the configuration of the run and its
tokenizer. Both hold digests.
"""

import json
import os
from typing import Any

from absl import logging
from flax import nnx

from simplernn_jax import config as config_lib
from simplernn_jax.checkpoint.folder import (
    BEST,
    CheckpointFolder,
    choose_checkpoint,
    read_texts,
    read_tree,
)
from simplernn_jax.config import Config
from simplernn_jax.data.tokenizer import Tokenizer, tokenizer_from_json
from simplernn_jax.errors import UserError
from simplernn_jax.files import read_file, sha256_hex
from simplernn_jax.models import LanguageModel
from simplernn_jax.models.language_model import abstract_model
from simplernn_jax.models.mixers.token_mixer import load_plugin
from simplernn_jax.models.pytorch_weights import (
    Weights,
    model_from_weights,
    read_pytorch_weights,
    weights_digest,
)

WEIGHTS = "model.safetensors"
RUN = "simplernn.json"
_MAX_RUN_BYTES = 1 << 30
"""Maximum size of `RUN`, which holds a whole tokenizer."""


def run_json(config: Config, tokenizer: Tokenizer, weights: Weights) -> str:
    """Serialize the configuration and the tokenizer of a run, with digests of them and `weights`.

    A fine-tuned copy of the weights has no digest, and is loaded with the same file.
    """
    run = {
        "config": json.loads(config_lib.to_json(config)),
        "tokenizer": json.loads(tokenizer.to_json()),
        "weights_sha256": weights_digest(weights),
    }
    return json.dumps(run | {"sha256": _digest_of(run)}, indent=2) + "\n"


def is_exported(folder: Any) -> bool:
    """Return whether `folder` is an exported model; anything that is not a path is not."""
    is_path = isinstance(folder, str | os.PathLike)
    return is_path and os.path.isfile(os.path.join(os.fsdecode(folder), RUN))


def load_exported(folder: str) -> tuple[LanguageModel, Tokenizer, Config]:
    """Load an exported model, executing nothing; raises `UserError` if it is corrupt."""
    path = os.path.join(folder, RUN)
    try:
        run: Any = json.loads(read_file(path, _MAX_RUN_BYTES))
        if not isinstance(run, dict):
            raise ValueError("not an object")
        if "sha256" in run and run.pop("sha256") != _digest_of(run):
            raise ValueError("its content differs from what was exported")
        digest = run.pop("weights_sha256", None)
        if run.keys() != {"config", "tokenizer"}:
            raise ValueError(f"its fields are {', '.join(run)}")
        config = config_lib.from_json(json.dumps(run["config"]))
        tokenizer = tokenizer_from_json(json.dumps(run["tokenizer"]))
    except (UserError, OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: {error}; export the model again") from error
    path = os.path.join(folder, WEIGHTS)
    model = model_from_weights(config.model, read_pytorch_weights(path, digest), path)
    return model, tokenizer, config


def _digest_of(run: dict[str, Any]) -> str:
    return sha256_hex(json.dumps(run, sort_keys=True))


def load_model(
    workdir: str | os.PathLike[str],
    checkpoint: str | int = BEST,
    *,
    plugin: str | os.PathLike[str] | None = None,
) -> tuple[LanguageModel, Tokenizer, Config]:
    """Load the trained model of a run, its tokenizer and its configuration.

    The checkpoint is verified and restored; nothing in it is executed.

    Args:
      workdir: folder of a training run, or of its export as safetensors or for Hugging Face.
      checkpoint: of a training run: ``best``, the one of lowest validation loss, or the newest if
        none was evaluated; ``newest``; or a step.
      plugin: Python file or module that registers the run's mixers.

    Returns:
      The model, with float32 parameters on the default device; its tokenizer; the configuration of
      the run.

    Raises:
      UserError: `workdir` has no such checkpoint, or no valid one, or its export is corrupt, or
        the tokenizer has ids that the model does not have.
    """
    if plugin is not None:
        load_plugin(plugin)
    workdir = os.fspath(workdir) if isinstance(workdir, os.PathLike) else workdir
    loaded = load_exported(workdir) if is_exported(workdir) else _load_run(workdir, checkpoint)
    model, tokenizer, _ = loaded
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"{workdir}: the tokenizer has {tokenizer.vocab_size:,} ids and the model "
            f"{model.config.vocab_size:,}; use the tokenizer that the model was trained with"
        )
    return loaded


def _load_run(workdir: str, checkpoint: str | int) -> tuple[LanguageModel, Tokenizer, Config]:
    step, reason = choose_checkpoint(workdir, checkpoint)
    if reason:
        logging.info("%s", reason)
    path = CheckpointFolder(workdir).step_path(step)
    config, tokenizer_json = read_texts(path)
    graph, params = abstract_model(config.model)
    params = read_tree(path, {"params": params}, partial=True)["params"]
    return nnx.merge(graph, params), tokenizer_from_json(tokenizer_json), config
