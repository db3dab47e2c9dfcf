"""Trainings of configurations and their baselines for some times, and the tables of their losses.

Every training runs in its own process. A program that runs again replaces its results.
"""

import os
import statistics
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from simplernn_jax.cli import config_files
from simplernn_jax.config import Config, validate
from simplernn_jax.data.corpora import open_corpus
from simplernn_jax.errors import UserError

from ..measure import call_isolated
from ..tables import Curves, Row, Table
from .trainers import LABELS, OURS, default_programs, train_timed

TITLE = "baselines: "


class Request(NamedTuple):
    """A configuration and its baselines to train."""

    name: str
    config: Config
    times: Sequence[float]
    """Training times of each program, in seconds; 0: as many steps as its settings say."""
    seeds: int
    programs: Sequence[str]
    rate: float | None
    """Learning rate of every baseline, in place of its setting."""


def make_requests(
    names: Sequence[str],
    source: str | None,
    times: Sequence[float],
    seeds: int,
    programs: Sequence[str],
    rate: float | None,
) -> list[Request]:
    """Check the flags of the command line, before hours of work.

    Raises:
      UserError: a configuration has no text, holds out none of it, or has no number of steps.
    """
    requests = []
    for name in names:
        config = config_files.load_config(name)
        config.mesh.data = 1
        config.data.source = os.path.expanduser(source or config.data.source)
        if os.path.exists(config.data.source):  # results.json names it
            config.data.source = os.path.abspath(config.data.source)
        validate(config)
        open_corpus(config.data)
        if not config.data.validation_fraction:
            raise UserError(f"{name}: holds out no text (data.validation_fraction); leave it out")
        if not config.train.steps and 0 in times:
            raise UserError(f"{name}: has no number of steps; give it a time, such as --seconds=60")
        chosen = programs or default_programs(config.data.tokenizer)
        requests.append(Request(name, config, times, seeds, chosen, rate))
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
        cases = [(limit, program) for limit in request.times for program in request.programs]
        with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
            for limit, program in cases:
                try:
                    runs = [train(program, request, limit, folder, n) for n in range(request.seeds)]
                except (subprocess.CalledProcessError, UserError) as error:
                    print(f"  {program}: {error}", flush=True)
                    failed.append(f"{program} of {request.name}")
                    continue
                others = [row for row in data["runs"] if case_of(row) != (limit, program)]
                data["runs"] = others + runs
                rows = summarize(data)
                picture = f"baselines_{request.name}"
                yield Table(title, rows, panels_of(rows, unit), "seconds", picture, "", dict(data))
    if failed:
        raise UserError(f"failed, with the output above: {', '.join(failed)}")


def train(program: str, request: Request, limit: float, folder: str, seed: int) -> Row:
    """Train a program in its own process; return the row of `train_timed`."""
    rate = None if program == OURS else request.rate
    given: Row = {"config": request.config, "workdir": folder, "name": program, "rate": rate}
    row: Row = call_isolated(train_timed, **given, limit=limit, seed=seed)
    steps = f"{row['steps']:,} steps in {row['seconds']:.1f} s"
    print(f"  {program}, rate {row['rate']}, seed {seed}: {steps}: {row['loss']:.4f}", flush=True)
    return row


def case_of(run: Row) -> tuple[float, str]:
    """Time and program of a run."""
    return run["limit"], run["program"]


def summarize(data: Row) -> list[Row]:
    """Rows of a configuration's table by time and program, medians over seeds."""
    rows: list[Row] = []
    for limit, program in sorted({case_of(run): None for run in data["runs"]}, key=lambda c: c[0]):
        runs = [run for run in data["runs"] if case_of(run) == (limit, program)]
        losses = [run["loss"] for run in runs]
        row: Row = {"time": limit} | {
            key: runs[0][key] for key in ("program", "parameters", "rate")
        }
        row["steps"] = round(statistics.median(run["steps"] for run in runs))
        row["seconds"] = statistics.median(run["seconds"] for run in runs)
        rows.append(
            row | {data["unit"]: statistics.median(losses), "range": max(losses) - min(losses)}
        )
    return rows


def panels_of(rows: Sequence[Row], unit: str) -> dict[str, Curves]:
    """Loss of every program by time, where there are several."""
    if len({row["time"] for row in rows}) < 2:
        return {}
    curves: dict[str, dict[str, float]] = {}
    for row in rows:
        curves.setdefault(LABELS[row["program"]], {})[f"{row['time']:g}"] = row[unit]
    return {unit: curves}
