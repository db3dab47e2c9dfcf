"""What is settled before anything is compiled: data, sizes, and whether a run can go on."""

import dataclasses
import math
import os

from simplernn_jax import config as config_lib
from simplernn_jax.config import Config
from simplernn_jax.data.batches import steps_per_epoch
from simplernn_jax.data.token_store import TokenizedCorpus, prepare_corpus
from simplernn_jax.data.tokenizer import tokenizer_from_json
from simplernn_jax.errors import UserError
from simplernn_jax.training.checkpoint import check_same_model, read_config
from simplernn_jax.training.checkpoint_folder import CheckpointFolder


def prepare(config: Config, workdir: str) -> tuple[Config, TokenizedCorpus]:
    """The configuration with the tokenizer's number of ids, and the tokenized corpus.

    Raises:
      UserError: the data is unusable, or `workdir` holds a run of another model or other batches.
    """
    saved = _saved_run(workdir)
    if saved is not None:
        _check_same_batches(config, saved[0])
    corpus = prepare_corpus(
        config.data,
        config.train.seed,
        tokens_folder(config, workdir),
        tokenizer=None if saved is None else tokenizer_from_json(saved[1]),
    )
    rows = max(config.model.vocab_size, corpus.tokenizer.vocab_size)
    model = dataclasses.replace(config.model, vocab_size=rows)
    config = dataclasses.replace(config, model=model)
    if saved is not None:
        check_same_model(config, saved[0])
    return config, corpus


def tokens_folder(config: Config, workdir: str) -> str:
    """Where the tokenized corpora of a run lie."""
    return config.data.cache_dir or os.path.join(workdir, "tokens")


def total_steps(config: Config, corpus: TokenizedCorpus) -> int:
    """Optimizer steps of the whole run."""
    per_epoch = steps_per_epoch(corpus.train, config.data)
    return config.train.steps or math.ceil(config.train.epochs * per_epoch)


def _saved_run(workdir: str) -> tuple[Config, str] | None:
    """Configuration and tokenizer of the newest whole checkpoint, if there is one."""
    if CheckpointFolder(workdir).newest_whole() is None:
        return None
    config, tokenizer_json, _ = read_config(workdir)
    return config, tokenizer_json


def _check_same_batches(ours: Config, theirs: Config) -> None:
    """A position in the data means something only for the same batches."""
    free = {"cache_dir": theirs.data.cache_dir}
    fields = config_lib.differing_fields(dataclasses.replace(ours.data, **free), theirs.data)
    if ours.train.seed != theirs.train.seed:
        fields.append(f"seed: {ours.train.seed} here, {theirs.train.seed} there")
    if fields:
        raise UserError(
            f"the checkpoint was trained on other batches: {'; '.join(fields)} (in the "
            "checkpoint); use the same --config.data and seed values, or another --workdir"
        )
