"""What a ladder is asked to run: the flags of its command line, checked before hours of work."""

import importlib.util
import math
import os
from collections.abc import Sequence
from typing import NamedTuple

from simplernn_jax import config_files
from simplernn_jax.config import Config, validate
from simplernn_jax.data.corpora import open_corpus
from simplernn_jax.errors import UserError, counted

from .peers import ON_TORCH, OURS, default_names, find_peer


class Request(NamedTuple):
    """A rung to run."""

    rung: str
    """Name of its configuration."""
    config: Config
    seconds: float
    """Training time of each program; 0: as many steps as its settings say."""
    seeds: int
    names: Sequence[str]
    rates: Sequence[float]
    """Learning rates to try for every peer. A single one is used without a trial; none: that of its
    settings."""


def make_requests(
    rungs: Sequence[str],
    source: str | None,
    seconds: Sequence[str],
    seeds: int,
    names: Sequence[str],
    rates: Sequence[str],
) -> list[Request]:
    """Check the flags of the command line.

    Raises:
      UserError: as of `make_request`, there is no rung, seconds are neither one number of at least
        0 nor one for each rung, or rates are not different positive numbers.
    """
    if not rungs:
        raise UserError("--rungs: name a configuration, such as base")
    numbers = _numbers("seconds", seconds)
    if not all(0 <= number < math.inf for number in numbers):
        raise UserError(f"--seconds={','.join(seconds)}: must be 0 or more")
    if len(numbers) not in (1, len(rungs)):
        raise UserError(
            f"--seconds={','.join(seconds)}: {counted(len(numbers), 'value')} for "
            f"{counted(len(rungs), 'rung')}; give one, or one for each rung"
        )
    numbers = numbers * len(rungs) if len(numbers) == 1 else numbers
    tried = _numbers("rates", rates)
    if not all(0 < rate < math.inf for rate in tried) or len(set(tried)) < len(tried):
        raise UserError(f"--rates={','.join(rates)}: list different positive numbers")
    return [
        make_request(rung, source, each, seeds, names, tried)
        for rung, each in zip(rungs, numbers, strict=True)
    ]


def make_request(
    rung: str,
    source: str | None,
    seconds: float,
    seeds: int,
    names: Sequence[str],
    rates: Sequence[float],
) -> Request:
    """Check the flags for one rung.

    Raises:
      UserError: no such configuration or text, it holds out no text, its number of steps is open,
        or PyTorch is missing.
    """
    config = config_files.load_config(rung)
    config.mesh.data = 1
    config.data.source = os.path.expanduser(source or config.data.source)
    if os.path.exists(config.data.source):  # results.json names it
        config.data.source = os.path.abspath(config.data.source)
    validate(config)
    open_corpus(config.data)
    if not config.data.validation_fraction:
        raise UserError(f"{rung}: holds out no text (data.validation_fraction); leave it out")
    if not config.train.steps and not seconds:
        raise UserError(f"{rung}: has no number of steps; give it a time, such as --seconds=60")
    names = names or default_names(config.data.tokenizer)
    on_torch = [n for n in names if n != OURS and find_peer(n, config).model in ON_TORCH]
    if on_torch and importlib.util.find_spec("torch") is None:
        others = ",".join(name for name in names if name not in on_torch)
        raise UserError(
            f"{', '.join(on_torch)}: torch is not installed (pip install -e '.[bench]'); leave out "
            f"what needs it: --programs={others or OURS}"
        )
    return Request(rung, config, seconds, seeds, names, rates)


def _numbers(flag: str, values: Sequence[str]) -> list[float]:
    try:
        return [float(value) for value in values]
    except ValueError as error:
        raise UserError(f"--{flag}={','.join(values)}: {error}; list numbers") from error
