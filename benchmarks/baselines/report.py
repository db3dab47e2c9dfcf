"""Trainings of configurations and their baselines, and the tables and picture of their losses.

Every training runs in its own process. A program that runs again replaces its results.
"""

import itertools
import math
import os
import statistics
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from simplernn_jax.cli import config_files
from simplernn_jax.config import Config, validate
from simplernn_jax.data.corpora import open_corpus
from simplernn_jax.errors import UserError

from ..measure import call_isolated
from ..tables import Curves, Row, Table
from .trainers import LABELS, OURS, default_programs, train_timed

TITLE = "baselines: "
TARGETS = {
    "shakespeare": ("tinyshakespeare.txt", 1.874),
    "shakespeare_gpu_budget": ("tinyshakespeare.txt", 1.4697),
    "base": ("stdlib", 1.62),
    "hour": ("stdlib", 1.45),
}
"""Text and loss, in its unit, by configuration; the first two losses are nanoGPT's."""


class Request(NamedTuple):
    """A configuration and its baselines to train."""

    name: str
    config: Config
    seconds: float
    """Training time of each program; 0: as many steps as its settings say."""
    seeds: int
    programs: Sequence[str]
    rate: float | None
    """Learning rate of every baseline, in place of its setting."""


def make_requests(
    names: Sequence[str],
    source: str | None,
    seconds: Sequence[float],
    seeds: int,
    programs: Sequence[str],
    rate: float | None,
) -> list[Request]:
    """Check the flags of the command line, before hours of work.

    Raises:
      UserError: seconds are neither one number of at least 0 nor one for each configuration; or a
        configuration has no text, holds out none of it, or has no number of steps.
    """
    if len(seconds) not in (1, len(names)) or not all(0 <= limit < math.inf for limit in seconds):
        raise UserError("--seconds: give one number of 0 or more, or one for each configuration")
    requests = []
    for name, limit in zip(names, itertools.cycle(seconds), strict=False):
        config = config_files.load_config(name)
        config.mesh.data = 1
        config.data.source = os.path.expanduser(source or config.data.source)
        if os.path.exists(config.data.source):  # results.json names it
            config.data.source = os.path.abspath(config.data.source)
        validate(config)
        open_corpus(config.data)
        if not config.data.validation_fraction:
            raise UserError(f"{name}: holds out no text (data.validation_fraction); leave it out")
        if not config.train.steps and not limit:
            raise UserError(f"{name}: has no number of steps; give it a time, such as --seconds=60")
        chosen = programs or default_programs(config.data.tokenizer)
        requests.append(Request(name, config, limit, seeds, chosen, rate))
    return requests


def run(requests: Sequence[Request], kept: Mapping[str, Table]) -> Iterator[Table]:
    """Train all programs; the table of their configuration so far, after each program.

    Results of other programs in `kept` stay.

    Raises:
      UserError: programs have failed, after all others have run.
    """
    failed = []
    for request in requests:
        title, config = f"{TITLE}{request.name}", request.config.data
        unit = "nats/char" if config.tokenizer == "char" else "bits/byte"
        data: Row = {"source": config.source, "unit": unit}
        data["runs"] = kept[title].data["runs"] if title in kept else []
        seconds = f"{request.seconds:g} s each." if request.seconds else "Steps of its settings."
        with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
            for program in request.programs:
                try:
                    runs = [train(program, request, folder, n) for n in range(request.seeds)]
                except (subprocess.CalledProcessError, UserError) as error:
                    print(f"  {program}: {error}", flush=True)
                    failed.append(f"{program} of {request.name}")
                    continue
                data["runs"] = [row for row in data["runs"] if row["program"] != program] + runs
                rows, panels = summarize(request.name, data), panels_of(data)
                picture = f"baselines_{request.name}"
                yield Table(title, rows, panels, "seconds", picture, seconds, dict(data))
    if failed:
        raise UserError(f"failed, with the output above: {', '.join(failed)}")


def train(program: str, request: Request, folder: str, seed: int) -> Row:
    """Train a program in its own process; return the row of `train_timed`."""
    rate = None if program == OURS else request.rate
    given: Row = {"config": request.config, "workdir": folder, "name": program, "rate": rate}
    row: Row = call_isolated(train_timed, **given, seconds=request.seconds, seed=seed)
    steps = f"{row['steps']:,} steps in {row['seconds']:.1f} s"
    print(f"  {program}, rate {row['rate']}, seed {seed}: {steps}: {row['loss']:.4f}", flush=True)
    return row


def seconds_until(curve: Sequence[tuple[float, float]], target: float) -> float | None:
    """Seconds when the loss first reaches `target`, interpolated; None if it never does."""
    reached = next((at for at, (_, loss) in enumerate(curve) if loss <= target), None)
    if reached is None:
        return None
    seconds, losses = zip(*reversed(curve[max(reached - 1, 0) : reached + 1]), strict=True)
    return float(np.interp(target, losses, seconds))


def target_of(name: str, data: Row) -> float | None:
    """Loss that a configuration is to reach on its own text."""
    text, target = TARGETS.get(name, ("", None))
    return target if Path(data["source"]).name == text else None


def summarize(name: str, data: Row) -> list[Row]:
    """Rows of a configuration's table, medians over seeds."""
    unit, target = data["unit"], target_of(name, data)
    rows: list[Row] = []
    for program in dict.fromkeys(run["program"] for run in data["runs"]):
        runs = [run for run in data["runs"] if run["program"] == program]
        losses = [run["loss"] for run in runs]
        row: Row = {"program": program} | {key: runs[0][key] for key in ("parameters", "rate")}
        row["steps"] = round(statistics.median(run["steps"] for run in runs))
        row["seconds"] = statistics.median(run["seconds"] for run in runs)
        row |= {unit: statistics.median(losses), "range": max(losses) - min(losses)}
        if target is not None:
            reached = [seconds_until(run["curve"], target) for run in runs]
            times = [seconds for seconds in reached if seconds is not None]
            complete = len(times) == len(reached)
            row[f"seconds to {target}"] = statistics.median(times) if complete else None
        rows.append(row)
    return rows


def panels_of(data: Row) -> dict[str, Curves]:
    """Loss of the first seed of every program, by seconds of training."""
    curves: dict[str, dict[str, float]] = {}
    for run in data["runs"]:
        seconds, losses = zip(*run["curve"], strict=True)
        points = [2**n for n in range(16) if seconds[0] <= 2**n <= seconds[-1]]
        curve = {str(x): float(np.interp(x, seconds, losses)) for x in points}
        curves.setdefault(LABELS[run["program"]], curve)
    return {data["unit"]: curves} if any(curves.values()) else {}
