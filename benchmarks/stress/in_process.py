"""Small training runs in this process."""

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from absl import logging

from simplernn_jax import config_files
from simplernn_jax.config import Config
from simplernn_jax.errors import UserError
from simplernn_jax.training.loop import train

from ..train_steps import change
from .runs import write_text

Result = TypeVar("Result")


def small_config(folder: Path, **fields: Any) -> Config:
    """``configs/tiny.py``, smaller, on a text in `folder`; `fields` of any section by name."""
    config = config_files.load_config("tiny")
    sizes = {"num_layers": 1, "hidden_dim": 8, "key_dim": 8, "value_dim": 8, "mlp_dim": 12}
    data = {
        "source": str(write_text(folder / "corpus.txt", 3001)),
        "cache_dir": str(folder / "tokens"),
        "split": "position",
        "mode": "stream",
        "batch_size": 2,
        "sequence_length": 16,
    }
    steps = {"epochs": 0, "save_every": 0, "eval_every": 0, "eval_tokens": 512, "data": 1}
    change(config, **{**sizes, **data, **steps, **fields})
    return config


def run_quietly(config: Config, workdir: Path) -> None:
    """Train, or resume, without output; raises as `train`, and KeyboardInterrupt for a signal."""
    with quiet():
        result = train(config, str(workdir))
    if result.interrupted_by:
        raise KeyboardInterrupt


@contextlib.contextmanager
def quiet() -> Any:
    """Drop what is printed and logged."""
    logger = logging.get_absl_logger()  # whose level `set_verbosity` would not restore
    before = logger.level
    logger.setLevel("CRITICAL")
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(before)


def outcome(call: Callable[[], Result]) -> Result | str:
    """Result of `call`, or the line of its `UserError`; ValueError if that has several lines."""
    try:
        return call()
    except UserError as error:
        message = str(error)
        if "\n" in message or not message:
            raise ValueError(f"an error of {message.count(chr(10)) + 1} lines") from error
        return message
