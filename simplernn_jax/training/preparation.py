"""Preparation of a run before anything is compiled: its data, and whether it can resume."""

import dataclasses
import math
import os

from absl import logging

from simplernn_jax import config as config_lib
from simplernn_jax.checkpoint.checkpointer import check_same_model, read_config
from simplernn_jax.checkpoint.contents import TEXTS, read_json, read_texts
from simplernn_jax.checkpoint.folder import CheckpointFolder
from simplernn_jax.config import Config, TrainConfig
from simplernn_jax.data.batches import steps_per_epoch
from simplernn_jax.data.chat_template import ChatTemplate, TemplateError, load_template
from simplernn_jax.data.corpora import absolute_source
from simplernn_jax.data.evaluation_batches import check_scorable
from simplernn_jax.data.file_search import matching_files
from simplernn_jax.data.mixture import parse_mixture
from simplernn_jax.data.store_reader import CorruptStore
from simplernn_jax.data.token_store import TokenizedCorpus, TokenSplit, find_corpus, prepare_corpus
from simplernn_jax.data.tokenizer import Tokenizer
from simplernn_jax.data.tokenizer_loading import tokenizer_from_json
from simplernn_jax.errors import UserError
from simplernn_jax.parallel.distributed import check_same, run_on_coordinator_first
from simplernn_jax.training.initial_parameters import filled_from, with_initial_model

MAX_DEFAULT_PROMPT = 40
"""Maximum length of the default prompt of samples, in characters."""

_TOKENS_SEARCHED = 4096


def prepare(config: Config, workdir: str) -> tuple[Config, TokenizedCorpus]:
    """Return the configuration as checkpoints store it, and the tokenized corpus.

    The model's vocabulary is at least the tokenizer's, the paths of ``source``, ``cache_dir`` and
    ``init_from`` are absolute, and ``template`` is a text. With ``init_from``, the tokenizer is
    that of its run. Of several processes, process 0 tokenizes first: the others use its tokens, or
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
        tokens_folder(config, workdir),
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


def tokens_folder(config: Config, workdir: str) -> str:
    """Return the folder of the tokenized corpora of a run."""
    return _absolute(config.data.cache_dir) or os.path.join(workdir, "tokens")


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
    problem = f"tokenized text not found in {folder}"
    try:
        corpus = find_corpus(folder, wanted, tokenizer)
        if corpus is not None:
            return corpus
    except CorruptStore as error:
        problem = f"tokenized text in {folder} is corrupted ({error})"
    if not source:
        original = f" (originally {config.data.cache_dir})" if config.data.cache_dir else ""
        raise UserError(
            f"{problem}; pass --cache_dir{original} or --corpus_source (originally "
            f"{config.data.source})"
        )
    if config.data.template:
        ChatTemplate(config.data.template)  # a path is not a template
    data = dataclasses.replace(config.data, source=source)
    corpus = prepare_corpus(
        data, config.train.seed, folder, tokenizer=tokenizer, exclude=(workdir,)
    )
    if corpus.content_hash != wanted:
        raise UserError(
            f"--corpus_source={source}: not the text that the run in {workdir} was trained on "
            f"({config.data.source}); use the same text"
        )
    return corpus


_SCHEDULE = (
    *("train.steps", "train.epochs"),
    *("optimizer.learning_rate", "optimizer.warmup_steps", "optimizer.final_learning_rate"),
)
"""Fields that change the learning rate of later steps."""


def changed_fields(current: Config, saved: Config) -> list[str]:
    """Return a line for each field of a resumed run that differs from its checkpoint."""
    lines, before = [], config_lib.by_field(saved)
    for name, new in config_lib.by_field(current).items():
        if new != before[name] and name != "data.cache_dir":  # which has no effect on training
            note = "; this rescales the learning rate schedule" if name in _SCHEDULE else ""
            lines.append(f"--config.{name}: changed from {before[name]!r} to {new!r}{note}")
    return lines


def total_steps(config: Config, corpus: TokenizedCorpus) -> int:
    """Return the optimizer steps of the whole run; `UserError` beyond a 32-bit counter."""
    per_epoch = steps_per_epoch(corpus.train, config.data)
    steps = config.train.steps or math.ceil(config.train.epochs * per_epoch)
    if steps >= 2**31:
        raise UserError(
            f"--config.train.epochs={config.train.epochs} gives {steps:,} steps; the maximum is "
            "2**31 - 1"
        )
    return steps


def _absolute(folder: str) -> str:
    return os.path.abspath(os.path.expanduser(folder)) if folder else ""


def _chat_prompt(config: Config, corpus: TokenizedCorpus) -> str:
    """Return the prompt, a user message; an empty one if the default cannot be encoded."""
    template = ChatTemplate(config.data.template)
    prompt = config.train.sample_prompt
    while True:
        try:
            corpus.tokenizer.encode(template.render_next([{"role": "user", "content": prompt}]))
            return prompt
        except (TemplateError, UserError) as error:
            if prompt != TrainConfig.sample_prompt:
                raise UserError(f"--config.train.sample_prompt={prompt!r}: {error}") from error
            prompt = ""


def _sample_prompt(config: Config, corpus: TokenizedCorpus) -> str:
    """Return the prompt, or a line of text if the tokenizer cannot encode the default one.

    A user-supplied prompt is validated here, before training.
    """
    prompt = config.train.sample_prompt
    if not config.train.sample_every:
        return prompt
    if config.data.template:
        return _chat_prompt(config, corpus)
    try:
        corpus.tokenizer.encode(prompt)
    except UserError as error:
        if prompt != TrainConfig.sample_prompt:
            raise UserError(f"--config.train.sample_prompt={prompt!r}: {error}") from error
        split = corpus.validation or corpus.train
        line = _first_line(split, corpus.tokenizer)
        logging.info(
            "the tokenizer cannot encode the default sample prompt %r; using %r from the %s text",
            *(prompt, line, "held-out" if corpus.validation else "training"),
        )
        return line
    return prompt


def _first_line(split: TokenSplit, tokenizer: Tokenizer) -> str:
    """Return the beginning of the first nonblank line; "" if the first tokens hold none."""
    text = tokenizer.decode(split.tokens[:_TOKENS_SEARCHED])
    lines = [line.strip() for line in text.splitlines()]
    return next(filter(None, lines), "")[:MAX_DEFAULT_PROMPT]


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
    exists = "stdlib" in (given, saved) or all(
        path == "stdlib" or os.path.exists(path) or matching_files(path) for path in paths
    )
    may_differ = not exists or isinstance(given, config_lib.PythonSource)
    if not may_differ and os.path.realpath(absolute_source(given)) != os.path.realpath(saved):
        raise UserError(
            f"{workdir} was trained on --config.data.source={saved}, not {given}; pass that, omit "
            "--config, or use another --workdir"
        )


def _check_same_batches(current: Config, saved: Config) -> None:
    """Check that the data settings match; otherwise the saved data position is invalid.

    The sources are compared by `_check_source`, and their content when the state is restored.
    """
    same = {name: getattr(saved.data, name) for name in ("cache_dir", "max_expansion", "source")}
    data = dataclasses.replace(current.data, **same)
    fields = config_lib.differing_fields(data, saved.data)
    if current.train.seed != saved.train.seed:
        fields.append(f"seed is {current.train.seed}, checkpoint has {saved.train.seed}")
    if fields:
        raise UserError(
            f"the checkpoint has different data settings: {'; '.join(fields)}; use the same "
            "--config.data and seed values, omit --config, or use another --workdir"
        )
