"""Preparation of a run: its data, the model in ``init_from``, and whether it can resume."""

import dataclasses
import math
import os
import tempfile
from typing import Any

import jax
import numpy as np
from flax import nnx

from simplernn_jax import config as config_lib
from simplernn_jax.checkpoint.checkpointer import check_same_model, read_config
from simplernn_jax.checkpoint.contents import TEXTS, read_json, read_texts, read_tree
from simplernn_jax.checkpoint.folder import BEST, CheckpointFolder, choose_checkpoint
from simplernn_jax.config import Config, TrainConfig
from simplernn_jax.data.batches import steps_per_epoch
from simplernn_jax.data.chat_template import ChatTemplate, TemplateError, load_template
from simplernn_jax.data.corpora import absolute_source, parse_mixture
from simplernn_jax.data.evaluation_batches import check_scorable
from simplernn_jax.data.source_files import glob_folder
from simplernn_jax.data.store_files import CorruptStore
from simplernn_jax.data.token_store import TokenizedCorpus, TokenSplit, find_corpus, prepare_corpus
from simplernn_jax.data.tokenizer import Tokenizer, tokenizer_from_json
from simplernn_jax.errors import UserError
from simplernn_jax.inference.loading import is_exported, load_exported, read_run
from simplernn_jax.models import LanguageModel, load_gla_checkpoint
from simplernn_jax.models.gla_checkpoint import is_hugging_face_folder
from simplernn_jax.models.pytorch_weights import load_pytorch_weights
from simplernn_jax.parallel.distributed import (
    broadcast_from_coordinator,
    check_same,
    is_coordinator,
    run_on_coordinator_first,
)

_FREE_FIELDS = ("dropout", "precision")
"""Fields of the model in which fine-tuning may differ."""

_RESIDUAL_FIELDS = ("mlp_dim", "tie_embeddings")
"""Fields without an effect on plain layers."""


def prepare(config: Config, workdir: str) -> tuple[Config, TokenizedCorpus]:
    """Return the configuration as checkpoints store it, and the tokenized corpus.

    The model's vocabulary is at least the tokenizer's, the paths of ``source``, ``cache_dir`` and
    ``init_from`` are absolute, and ``template`` is a text. With ``init_from``, the tokenizer is
    its run's. Of several processes, process 0 tokenizes first: the others use its tokens, or
    tokenize the text again if ``cache_dir`` is on a local disk.

    Raises:
      UserError: the data is unusable, `workdir` holds a run with a different model or batches, or
        the processes differ in configuration or text.
    """
    difference = "has a different configuration from process 0; start all with the same command"
    check_same(config_lib.to_json(config), difference)
    config, corpus = run_on_coordinator_first(lambda: _prepare(config, workdir))
    check_same(
        corpus.content_hash, "reads different text from process 0; use the same text for all"
    )
    return config, corpus


def _prepare(config: Config, workdir: str) -> tuple[Config, TokenizedCorpus]:
    saved, tokenizer = _saved_run(workdir), None
    train = dataclasses.replace(config.train, init_from=_absolute(config.train.init_from))
    config = dataclasses.replace(config, train=train)
    if train.init_from and saved is not None:
        config = filled_from(config, saved[0])
    elif train.init_from:
        config, tokenizer = with_initial_model(config)
    template = load_template(config.data.template) if config.data.template else ""
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, template=template))
    if saved is not None:
        _check_same_batches(config, saved[0])
        _check_source(config.data.source, saved[0].data.source, workdir)
        tokenizer = tokenizer_from_json(saved[1])
    corpus = prepare_corpus(
        config.data,
        config.train.seed,
        _absolute(config.data.cache_dir) or os.path.join(workdir, "tokens"),
        tokenizer=tokenizer,
        exclude=(workdir,),
    )
    if corpus.validation is not None:
        check_scorable(corpus.validation)  # rather than at the first evaluation
    prompt = _sample_prompt(config, corpus)
    vocab_size = max(config.model.vocab_size, corpus.tokenizer.vocab_size)
    # Absolute, so that the checkpoint's copy is independent of the current folder.
    source, cache_dir = absolute_source(config.data.source), _absolute(config.data.cache_dir)
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, vocab_size=vocab_size),
        data=dataclasses.replace(config.data, source=source, cache_dir=cache_dir),
        train=dataclasses.replace(config.train, sample_prompt=prompt),
    )
    if saved is not None:
        check_same_model(config, saved[0])
        _check_same_optimizer(config, saved[0])
    return config, corpus


def open_saved_corpus(workdir: str, *, cache_dir: str = "", source: str = "") -> TokenizedCorpus:
    """Find the tokenized corpus that a run was trained on, by its content.

    The checkpoint is untrusted: the paths in its configuration are never opened.

    Args:
      workdir: folder of a training run.
      cache_dir: folder of the tokens; empty: ``tokens`` under `workdir`.
      source: the run's text, to re-tokenize if the tokens are missing or corrupted; empty: none.

    Returns:
      The corpus with the content hash of the checkpoint.

    Raises:
      UserError: `workdir` has no intact checkpoint, or the tokens are missing and `source` is
        empty, unusable or different text.
    """
    config, tokenizer_json, step = read_config(workdir)
    path = CheckpointFolder(workdir).step_path(step)
    data_state = read_json(path, "data")
    wanted = data_state.get("content_hash") if isinstance(data_state, dict) else None
    if not isinstance(wanted, str):
        raise UserError(f"{path}: has no content hash of its text; use another checkpoint")
    tokenizer = tokenizer_from_json(tokenizer_json)
    folder = _absolute(cache_dir) or os.path.join(workdir, "tokens")
    problem = f"tokenized text in {folder}: not found"
    try:
        corpus = find_corpus(folder, wanted, tokenizer)
        if corpus is not None:
            return corpus
    except CorruptStore as error:
        problem = f"the tokenized text is corrupted: {error}"
    if not source:
        raise UserError(
            f"{problem}; pass --cache_dir, originally {config.data.cache_dir or folder}, or "
            f"--corpus_source, originally {config.data.source}"
        )
    corpus = _tokenize_again(config, source, folder, tokenizer, exclude=(workdir,))
    if corpus.content_hash != wanted:
        raise UserError(
            f"--corpus_source={source}: not the text that the run in {workdir} was trained on "
            f"({config.data.source}); use the same text"
        )
    return corpus


def tokenize_source(source: str, config: Config, tokenizer: Tokenizer) -> TokenSplit:
    """Tokenize another text than a run's in the same way, as one split of that name.

    It leaves no file.

    Raises:
      UserError: the text is unusable, or a mixture.
    """
    if parse_mixture(source) is not None:
        raise UserError(f"--source={source}: a mixture, which only training takes; score one text")
    data = dataclasses.replace(config.data, split="position", validation_fraction=0.0)
    config = dataclasses.replace(config, data=data)
    with tempfile.TemporaryDirectory() as folder:  # mapped files outlive their names
        corpus = _tokenize_again(config, source, folder, tokenizer)
    return dataclasses.replace(corpus.train, name=source)


def _tokenize_again(
    config: Config, source: str, folder: str, tokenizer: Tokenizer, exclude: tuple[str, ...] = ()
) -> TokenizedCorpus:
    """Tokenize `source` with the settings of a checkpoint, which is untrusted."""
    if config.data.template:
        ChatTemplate(config.data.template)  # a path is not a template
    data = dataclasses.replace(config.data, source=source)
    return prepare_corpus(data, config.train.seed, folder, tokenizer=tokenizer, exclude=exclude)


def changed_fields(current: Config, saved: Config) -> list[str]:
    """Return a line for each field of a resumed run that differs from its checkpoint."""
    before = config_lib.by_field(saved)
    return [
        f"--config.{name}: changed from {before[name]!r} to {new!r}"
        for name, new in config_lib.by_field(current).items()
        if new != before[name] and name != "data.cache_dir"  # which has no effect on training
    ]


def total_steps(config: Config, corpus: TokenizedCorpus) -> int:
    """Return the optimizer steps of the whole run; `UserError` beyond a 32-bit counter."""
    per_epoch = steps_per_epoch(corpus.train, config.data)
    steps = config.train.steps or math.ceil(config.train.epochs * per_epoch)
    if steps >= 2**31:
        raise UserError(
            f"config.train.epochs={config.train.epochs} gives {steps:,} steps; the maximum is "
            "2**31 - 1"
        )
    return steps


def _absolute(folder: str) -> str:
    return os.path.abspath(os.path.expanduser(folder)) if folder else ""


def _sample_prompt(config: Config, corpus: TokenizedCorpus) -> str:
    """Return the prompt of samples, which is encoded here, before training.

    An empty one replaces the default if the tokenizer cannot encode that.
    """
    prompt = config.train.sample_prompt
    try:
        if config.train.sample_every:
            corpus.tokenizer.encode(sample_text(config, prompt))
    except (TemplateError, UserError) as error:
        if prompt != TrainConfig.sample_prompt:
            raise UserError(f"config.train.sample_prompt={prompt!r}: {error}") from error
        return ""
    return prompt


def sample_text(config: Config, prompt: str) -> str:
    """Return the text that a sample continues: the prompt, or a chat with that message."""
    if not config.data.template:
        return prompt
    return ChatTemplate(config.data.template).render_next([{"role": "user", "content": prompt}])


def _saved_run(workdir: str) -> tuple[Config, str] | None:
    """Return configuration and tokenizer of the newest checkpoint; None if there is none.

    Its arrays are verified when they are restored; if that falls back to an earlier checkpoint,
    it has the same model, batches and tokenizer.
    """
    folder = CheckpointFolder(workdir)
    step = folder.newest_intact(TEXTS)
    return None if step is None else read_texts(folder.step_path(step))


def _check_same_optimizer(current: Config, saved: Config) -> None:
    if current.optimizer.name != saved.optimizer.name:
        raise UserError(
            f"the checkpoint was trained with --config.optimizer.name={saved.optimizer.name}, and "
            f"{current.optimizer.name} cannot resume from its state; use the same, or another "
            "--workdir"
        )


def _check_source(given: str, saved: str, workdir: str) -> None:
    """Reject another source at once, unless it may be the text of the run, moved or from Python."""
    paths = [path for path, _ in parse_mixture(saved) or ()] or [saved]
    # A glob is not expanded, since it comes from a file: its folder stands for it.
    exists = "stdlib" in (given, saved) or all(
        path == "stdlib" or os.path.exists(glob_folder(path) or path) for path in paths
    )
    may_differ = not exists or isinstance(given, config_lib.PythonSource)
    if not may_differ and os.path.realpath(absolute_source(given)) != os.path.realpath(saved):
        raise UserError(
            f"{workdir} was trained on --config.data.source={saved}, not {given}; pass that, omit "
            "--config, or use another --workdir"
        )


def _check_same_batches(current: Config, saved: Config) -> None:
    """Check that the data settings match; otherwise the saved data position is invalid.

    The sources are compared by their content, when the state is restored.
    """
    same = {name: getattr(saved.data, name) for name in ("cache_dir", "max_expansion", "source")}
    data = dataclasses.replace(current.data, **same)
    fields = config_lib.differing_fields(data, saved.data)
    if current.train.seed != saved.train.seed:
        fields.append(f"seed is {current.train.seed}, checkpoint has {saved.train.seed}")
    if fields:
        raise UserError(
            f"the checkpoint has different data settings: {'; '.join(fields)}; use the same "
            "config.data and seed values, omit --config, or use another --workdir"
        )


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
            f"config.train.init_from: no checkpoint in {path}; name the folder of a run or export"
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
    found = initial.data.tokenizer
    if tokenizer is not None and filled.data.tokenizer != found:
        raise UserError(f"{_where(config)} has the tokenizer {found}; omit config.data.tokenizer")
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
      UserError: they cannot be read, or belong to another model.
    """
    path = config.train.init_from
    model = _load(path)
    if model is None:
        # The run may go on meanwhile: all processes read the checkpoint that process 0 sees.
        step = choose_checkpoint(path)[0] if is_coordinator() else 0
        step_path = CheckpointFolder(path).step_path(broadcast_from_coordinator(step))
        tree = {"params": abstract}
        placed = None if shardings is None else {"params": shardings}
        return read_tree(step_path, tree, placed, partial=True)["params"]
    params = nnx.state(model, nnx.Param)
    for wanted, found in zip(jax.tree.leaves(abstract), jax.tree.leaves(params), strict=True):
        if wanted.shape != found.shape:
            raise UserError(
                f"{_where(config)} has an array {list(found.shape)} where the model has "
                f"{list(wanted.shape)}; use the same config.model.vocab_size"
            )
    if shardings is None:
        return params

    def place(value: jax.Array, sharding: Any) -> jax.Array:
        whole = np.asarray(value)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    return jax.tree.map(place, params, shardings)


def _load(path: str) -> LanguageModel | None:
    """Load an export or weights; None if `path` is another folder, such as a workdir."""
    if is_exported(path):
        return load_exported(path)[0]
    if os.path.isfile(path):
        return load_pytorch_weights(path)
    return load_gla_checkpoint(path) if is_hugging_face_folder(path) else None


def _where(config: Config) -> str:
    return f"config.train.init_from={config.train.init_from}"
