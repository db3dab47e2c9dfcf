"""One export: written to a new folder, checked in a fresh process, and only then put in place."""

import contextlib
import dataclasses
import math
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from optax.losses import softmax_cross_entropy_with_integer_labels

from simplernn_jax.config import Config
from simplernn_jax.data.mixture import parse_mixture
from simplernn_jax.data.tokenizer import Tokenizer
from simplernn_jax.errors import UserError, format_bytes
from simplernn_jax.export import QUANTIZED_FORMATS
from simplernn_jax.export.checking import run_exported
from simplernn_jax.export.formats import (
    TrainedModel,
    compute_logits,
    find_format,
    float32_model,
    last_part,
    rounded_weights,
)
from simplernn_jax.files import sync
from simplernn_jax.inference.engine import split_model
from simplernn_jax.models import LanguageModel
from simplernn_jax.models.named_weights import model_from_weights, named_weights

TOLERANCE = 1e-3
"""Largest difference of logits between an export and the model, relative to the largest logit: far
above the rounding of float32 in another order, far below any mistake."""


class Report(NamedTuple):
    """Result of the check of an export."""

    num_bytes: int
    """Size of all files."""
    difference: float
    """Largest difference of logits, relative to the largest logit."""
    tokens_per_second: float
    """Decoding of one sequence, in the process of the check."""
    loss: float
    """Mean loss of the predictions of the checked text, in nats."""
    rounded_loss: float
    """The same with the weights of the export."""

    def __str__(self) -> str:
        text = (
            f"{format_bytes(self.num_bytes)}   largest difference of logits: {self.difference:.1e} "
            f"(relative)   {self.tokens_per_second:,.0f} tokens/s"
        )
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
      license, languages: of the weights, for the model card of huggingface.

    Raises:
      UserError: the format is unknown or needs a missing package, `out` exists or cannot be
        written, the model is not supported by it, or the exported one does not compute the same.
    """
    module = find_format(format_name)
    if quantize != "none" and format_name not in QUANTIZED_FORMATS:
        raise UserError(
            f"--quantize={quantize}: only with --format={' or '.join(QUANTIZED_FORMATS)}"
        )
    split_model(model)  # which checks the parameters
    model = float32_model(model)
    trained = TrainedModel(
        *(model, tokenizer, without_paths(config), workdir, quantize, license, tuple(languages))
    )
    with new_folder(out) as folder:
        module.write(trained, folder)
        text = tokenizer.decode(tokens)
        found = run_exported(format_name, folder, tokens, text)
        expected = compute_logits(model, tokens)
        rounded = expected
        if quantize != "none":
            arrays = rounded_weights(named_weights(model), quantize)
            rounded = compute_logits(model_from_weights(model.config, arrays, format_name), tokens)
        difference = float(np.abs(found.logits - rounded).max() / np.abs(rounded).max())
        if not difference <= TOLERANCE:
            raise UserError(
                f"--format={format_name}: the exported model differs by {difference:.1e}, more "
                f"than {TOLERANCE:g} of the largest logit; please report this with the "
                "configuration"
            )
        if found.ids != tokenizer.encode(text).tolist():
            raise UserError(
                f"--format={format_name}: the exported tokenizer encodes the held-out text "
                "differently; use another format"
            )
        num_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return Report(
        num_bytes,
        difference,
        found.tokens_per_second,
        mean_loss(expected, tokens),
        mean_loss(rounded, tokens),
    )


def _without_folders(source: str) -> str:
    """Return the last part of a path, or of each path of a mixture."""
    try:
        mixture = parse_mixture(source)
    except UserError:
        mixture = None
    if mixture is None:
        return last_part(source)
    return ",".join(f"{last_part(path)}:{weight:.4g}" for path, weight in mixture)


def without_paths(config: Config) -> Config:
    """Return a configuration that tells nothing about the machine of the run."""
    data, tokenizer = config.data, config.data.tokenizer
    is_file = tokenizer.startswith(("/", "~", ".")) or tokenizer.endswith(".json")
    if is_file or os.path.lexists(tokenizer):
        tokenizer = last_part(tokenizer)
    source = _without_folders(data.source)
    return dataclasses.replace(
        config,
        data=dataclasses.replace(data, source=source, tokenizer=tokenizer, cache_dir=""),
        train=dataclasses.replace(config.train, init_from=last_part(config.train.init_from)),
    )


@contextlib.contextmanager
def new_folder(out: str) -> Iterator[Path]:
    """Make a folder that becomes `out` if the block succeeds; raises `UserError` if it cannot."""
    check_new(out)
    parent = os.path.dirname(os.path.abspath(out))
    temporary = Path(parent, f".{secrets.token_hex(8)}.tmp")
    with _output_errors(out):
        os.makedirs(parent, exist_ok=True)
        temporary.mkdir()
    try:
        yield temporary
        with _output_errors(out):
            for path in [*temporary.rglob("*"), temporary]:
                sync(path)
            os.rename(temporary, out)
            sync(parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _output_errors(out: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        problem = error.strerror or error
        raise UserError(f"--out={out}: {problem}; use another folder") from error


def check_new(out: str) -> None:
    """Raise `UserError` if something is at `out`, or no folder with files can be created there."""
    if os.path.lexists(out):
        raise UserError(f"--out={out}: exists already; specify a new folder")
    # As long as the names of the files, and of the temporary folder, will be.
    path = Path(out).absolute() / ("0" * 64)
    missing = [one for one in (path, *path.parents) if not os.path.lexists(one)]
    try:
        with _output_errors(out):
            path.mkdir(parents=True)
    finally:
        for one in missing:
            with contextlib.suppress(OSError):
                one.rmdir()


def mean_loss(logits: np.ndarray, tokens: np.ndarray) -> float:
    """Return the mean loss of the predictions of all tokens but the first, in nats."""
    loss = float(softmax_cross_entropy_with_integer_labels(logits[:-1], tokens[1:]).mean())
    return loss if math.isfinite(loss) else math.nan
