"""Preparation of a run: its data, the model in ``init_from``, and whether it can resume."""

import copy
import dataclasses
import math
import os
import tempfile

from flax import nnx

from simplernn_jax import config as config_lib
from simplernn_jax.checkpoint.folder import (
    TEXTS,
    CheckpointFolder,
    read_config,
    read_json,
    read_texts,
)
from simplernn_jax.config import SET_BY_MINUTES, Config, differing_fields
from simplernn_jax.data.batches import steps_per_epoch
from simplernn_jax.data.chat_template import ChatTemplate, load_template
from simplernn_jax.data.corpora import absolute_source, parse_mixture
from simplernn_jax.data.evaluation_batches import check_scorable
from simplernn_jax.data.source_files import glob_folder
from simplernn_jax.data.store_files import CorruptStore
from simplernn_jax.data.token_store import TokenizedCorpus, TokenSplit, find_corpus, prepare_corpus
from simplernn_jax.data.tokenizer import Tokenizer, tokenizer_from_json
from simplernn_jax.errors import UserError
from simplernn_jax.inference.loading import is_exported, load_model
from simplernn_jax.models import LanguageModel, load_fla_checkpoint
from simplernn_jax.models.fla_checkpoint import is_hugging_face_folder
from simplernn_jax.models.pytorch_weights import load_pytorch_weights
from simplernn_jax.parallel.distributed import check_same, run_on_coordinator_first
from simplernn_jax.training.tuning import LEARNING_RATES

_TUNABLE_FIELDS = ("model.dropout", "model.precision")
"""Fields of the model in which fine-tuning of all parameters may differ."""

_RESIDUAL_FIELDS = ("model.mlp_dim", "model.tie_embeddings")
"""Fields without an effect on plain layers."""

_FIXED_FIELDS = ("optimizer.name", "train.seed", "train.tune")
"""Fields besides model and data in which a resumed run may not differ."""

_RESUMABLE_FIELDS = ("data.cache_dir", "data.max_expansion", "data.source")
"""Fields of the data in which a resumed run may differ: its text is compared by content."""


def prepare(config: Config, workdir: str) -> tuple[Config, TokenizedCorpus, nnx.State | None]:
    """Return the configuration as checkpoints store it, the tokenized corpus, and parameters.

    The model's vocabulary is at least the tokenizer's, the paths of ``source``, ``cache_dir`` and
    ``init_from`` are absolute, and ``template`` is a text. With ``init_from``, the tokenizer is
    its run's, and a new run starts from the parameters returned; else they are None. Of several
    processes, process 0 tokenizes first: the others use its tokens, or tokenize the text again if
    ``cache_dir`` is on a local disk.

    Raises:
      UserError: the data is unusable, `workdir` holds a run with a different model or batches, the
        model in ``init_from`` does not fit, or the processes differ in configuration or text.
    """
    difference = "has a different configuration from process 0; start all with the same command"
    check_same(config_lib.to_json(config), difference)
    config, corpus, params = run_on_coordinator_first(lambda: _prepare(config, workdir))
    check_same(
        corpus.content_hash, "reads different text from process 0; use the same text for all"
    )
    return config, corpus, params


def _prepare(config: Config, workdir: str) -> tuple[Config, TokenizedCorpus, nnx.State | None]:
    saved, initial, tokenizer = _saved_run(workdir), None, None
    config = copy.deepcopy(config)
    config.train.init_from = _absolute(config.train.init_from)
    if config.train.init_from and saved is not None:
        _fill(config, saved[0])
    elif config.train.init_from:
        initial, tokenizer = _start_from(config)
    if config.train.tune != "full" and not config.optimizer.is_given("learning_rate"):
        kind = config.train.tune.partition(":")[0]
        config.optimizer.learning_rate = LEARNING_RATES[kind]
    if config.data.template:
        config.data.template = load_template(config.data.template)
    if saved is not None:
        measured = ("train.minutes", "optimizer.warmup_steps", *SET_BY_MINUTES)
        for name in measured if config.train.minutes else ():  # when it began
            section, _, field = name.partition(".")
            setattr(getattr(config, section), field, getattr(getattr(saved[0], section), field))
        tokenizer = tokenizer_from_json(saved[1])
        config.model.vocab_size = max(config.model.vocab_size, tokenizer.vocab_size)
        _check_resumable(config, saved[0])
        _check_source(config.data.source, saved[0].data.source, workdir)
    corpus = prepare_corpus(
        config.data,
        config.train.seed,
        _absolute(config.data.cache_dir) or os.path.join(workdir, "tokens"),
        tokenizer=tokenizer,
        exclude=(workdir,),
    )
    if corpus.validation is not None:
        check_scorable(corpus.validation)  # rather than at the first evaluation
    config.model.vocab_size = max(config.model.vocab_size, corpus.tokenizer.vocab_size)
    if initial is not None and config.model.vocab_size != initial.config.vocab_size:
        raise UserError(
            f"config.train.init_from={config.train.init_from} has a vocabulary of "
            f"{initial.config.vocab_size:,}, not {config.model.vocab_size:,}; use the same "
            "config.model.vocab_size"
        )
    # Absolute, so that the checkpoint's copy is independent of the current folder.
    config.data.source = absolute_source(config.data.source)
    config.data.cache_dir = _absolute(config.data.cache_dir)
    return config, corpus, None if initial is None else nnx.state(initial, nnx.Param)


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
    data = dataclasses.replace(config.data, split="position", validation_fraction=0.0, fim_rate=0.0)
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


def total_steps(config: Config, corpus: TokenizedCorpus) -> int:
    """Return the optimizer steps of the whole run; with ``train.minutes``, they are not known."""
    if config.train.minutes:
        return 2**31 - 1
    per_epoch = steps_per_epoch(corpus.train, config.data)
    return config.train.steps or math.ceil(config.train.epochs * per_epoch)


def _absolute(folder: str) -> str:
    return os.path.abspath(os.path.expanduser(folder)) if folder else ""


def _saved_run(workdir: str) -> tuple[Config, str] | None:
    """Return configuration and tokenizer of the newest checkpoint; None if there is none.

    Its arrays are verified when they are restored; if that falls back to an earlier checkpoint,
    it has the same model, batches and tokenizer.
    """
    folder = CheckpointFolder(workdir)
    step = folder.newest_intact(TEXTS)
    return None if step is None else read_texts(folder.step_path(step))


def _check_resumable(current: Config, saved: Config) -> None:
    """Check what the saved state and the saved data position depend on."""
    fields = [
        difference
        for name, difference in differing_fields(current, saved).items()
        if name.startswith(("model.", "data.")) or name in _FIXED_FIELDS
        if name not in _RESUMABLE_FIELDS
    ]
    if fields:
        raise UserError(
            f"the checkpoint has different settings: {'; '.join(fields)}; use the same values, "
            "omit --config, or use another --workdir"
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


def _start_from(config: Config) -> tuple[LanguageModel, Tokenizer | None]:
    """Load the model in ``init_from``, and its tokenizer if it has one, and fill `config` from it.

    Raises:
      UserError: there is no model, or the configuration gives another one or another tokenizer.
    """
    path = config.train.init_from
    initial, tokenizer = config, None
    try:
        if os.path.isfile(path):
            model = load_pytorch_weights(path)
        elif is_hugging_face_folder(path) and not is_exported(path):
            model = load_fla_checkpoint(path)
        else:
            model, tokenizer, initial = load_model(path)
    except UserError as error:
        raise UserError(f"config.train.init_from: {error}") from error
    initial = dataclasses.replace(initial, model=model.config)
    _fill(config, initial)
    unused = _RESIDUAL_FIELDS if model.config.block == "plain" else ()
    free = ("model.vocab_size", *_tunable(config), *unused)  # a vocabulary grows with the tokenizer
    fields = [
        difference
        for name, difference in differing_fields(config, initial).items()
        if name == "data.tokenizer" or (name.startswith("model.") and name not in free)
    ]
    if fields:
        raise UserError(f"config.train.init_from={path}: {'; '.join(fields)}; omit these fields")
    return model, tokenizer


def _tunable(config: Config) -> tuple[str, ...]:
    # An update or a state is of one model, whose configuration is a part of it.
    return _TUNABLE_FIELDS if config.train.tune == "full" else ()


def _fill(config: Config, initial: Config) -> None:
    """Set fields of model and tokenizer that `config` leaves out to the values in `initial`."""
    for field in dataclasses.fields(config.model):
        if f"model.{field.name}" not in _tunable(config) and not config.model.is_given(field.name):
            setattr(config.model, field.name, getattr(initial.model, field.name))
    for name in ("tokenizer", "fim_rate"):
        if not config.data.is_given(name):
            setattr(config.data, name, getattr(initial.data, name))
    config_lib.validate(config)
