"""One export: written to a new folder, compared with the model, and only then put in place."""

import contextlib
import dataclasses
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from optax.losses import softmax_cross_entropy_with_integer_labels

from simplernn_jax.config import Config
from simplernn_jax.data.corpora import parse_mixture
from simplernn_jax.data.tokenizer import Tokenizer
from simplernn_jax.errors import UserError, format_bytes
from simplernn_jax.export import QUANTIZATIONS
from simplernn_jax.export.formats import (
    Loaded,
    TrainedModel,
    compute_logits,
    find_format,
    float32_model,
    rounded_weights,
)
from simplernn_jax.inference.engine import split_model
from simplernn_jax.models import LanguageModel
from simplernn_jax.models.pytorch_weights import model_from_weights, named_weights

TOLERANCE = 1e-3
"""Largest difference of logits between an export and the model, relative to the largest logit: far
above the rounding of float32 in another order, far below any mistake."""


class Report(NamedTuple):
    """Result of the check of an export."""

    num_bytes: int
    """Size of all files."""
    difference: float
    """Largest difference of logits, relative to the largest logit."""
    loss: float
    """Mean loss of the predictions of the checked text, in nats."""
    rounded_loss: float
    """The same with the weights of the export."""

    def __str__(self) -> str:
        size = format_bytes(self.num_bytes)
        text = f"{size}   largest difference of logits: {self.difference:.1e} (relative)"
        if self.rounded_loss != self.loss:
            change = self.rounded_loss - self.loss
            text += f"   loss {self.loss:.4f} -> {self.rounded_loss:.4f} nats ({change:+.4f})"
        return text


def export(
    format_name: str,
    model: LanguageModel,
    tokenizer: Tokenizer,
    config: Config,
    out: str,
    *,
    workdir: str,
    tokens: np.ndarray,
    quantize: str = "none",
    license: str = "",
    languages: Sequence[str] = (),
) -> Report:
    """Export a model to the new folder `out` and check it.

    Args:
      format_name: one of `FORMATS`.
      model, tokenizer, config: as `load_model` returns them.
      out: must not exist; nothing is there unless the export has passed its check.
      workdir: folder of the run, whose metrics describe the model.
      tokens: [T] ids of held-out text to compare logits on, T at least 2.
      quantize: how the weights are stored: one of `QUANTIZATIONS`.
      license, languages: of the weights and the text, for the model card of huggingface.

    Raises:
      UserError: the format is unknown or needs a missing package, `out` exists or cannot be
        written, the model is not supported by it, or the exported one does not compute the same.
    """
    if format_name not in (formats := QUANTIZATIONS[quantize]):
        raise UserError(f"--quantize={quantize}: only with --format={' or '.join(formats)}")
    module = find_format(format_name)
    split_model(model)  # which checks the parameters
    model = float32_model(model)
    trained = TrainedModel(
        model, tokenizer, without_paths(config), workdir, quantize, license, tuple(languages)
    )
    with new_folder(out) as folder:
        module.write(trained, folder)
        num_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        return _check(format_name, module.load(folder), trained, tokens, num_bytes)


def _check(
    format_name: str, loaded: Loaded, trained: TrainedModel, tokens: np.ndarray, num_bytes: int
) -> Report:
    """Compare an export with the model; raises `UserError` if it does not compute the same."""
    rounded = trained.model
    if trained.quantize != "none":
        weights = rounded_weights(named_weights(rounded), trained.quantize)
        rounded = model_from_weights(rounded.config, weights, format_name)
    expected = compute_logits(rounded, tokens)
    difference = float(np.abs(loaded.logits(tokens) - expected).max() / np.abs(expected).max())
    if not difference <= TOLERANCE:
        raise UserError(
            f"--format={format_name}: the exported model differs by {difference:.1e}, more than "
            f"{TOLERANCE:g} of the largest logit; please report this with the configuration"
        )
    text = trained.tokenizer.decode(tokens)
    if loaded.encode(text) != trained.tokenizer.encode(text).tolist():
        raise UserError(
            f"--format={format_name}: the exported tokenizer encodes the held-out text "
            "differently; use another format"
        )
    losses = (
        float(softmax_cross_entropy_with_integer_labels(logits[:-1], tokens[1:]).mean())
        for logits in (compute_logits(trained.model, tokens), expected)
    )
    return Report(num_bytes, difference, *losses)


def without_paths(config: Config) -> Config:
    """Return a configuration that tells nothing about the machine of the run."""
    data, tokenizer = config.data, config.data.tokenizer
    is_file = tokenizer.startswith(("/", "~", ".")) or tokenizer.endswith(".json")
    if is_file or os.path.lexists(tokenizer):
        tokenizer = Path(tokenizer).name
    source = _without_folders(data.source)
    return dataclasses.replace(
        config,
        data=dataclasses.replace(data, source=source, tokenizer=tokenizer, cache_dir=""),
        train=dataclasses.replace(config.train, init_from=Path(config.train.init_from).name),
    )


def _without_folders(source: str) -> str:
    """Return the last part of a path, or of each path of a mixture."""
    mixture = parse_mixture(source)
    if mixture is None:
        return Path(source).name
    return ",".join(f"{Path(path).name}:{weight:.4g}" for path, weight in mixture)


@contextlib.contextmanager
def new_folder(out: str) -> Iterator[Path]:
    """Make a folder that becomes `out` if the block succeeds; raises `UserError` if it cannot."""
    check_new(out)
    temporary = Path(out).absolute().parent / f".{secrets.token_hex(8)}.tmp"
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"--out={out}: {error.strerror}; use another folder") from error
    try:
        yield temporary
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_new(out: str) -> None:
    """Raise `UserError` if something is at `out`, or nothing can be."""
    try:
        os.lstat(out)
    except FileNotFoundError:
        return
    except OSError as error:  # such as a name that is too long
        raise UserError(f"--out={out}: {error.strerror}; use another folder") from error
    raise UserError(f"--out={out}: exists already; specify a new folder")
