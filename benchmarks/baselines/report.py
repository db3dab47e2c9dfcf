"""Trainings of configurations and their baselines, and the tables and picture of their losses.

Every training is a process of its own. A program that runs again replaces its results.
"""

import math
import os
import statistics
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from simplernn_jax import project
from simplernn_jax.analysis.plots import add_legend, new_figure, png
from simplernn_jax.cli import config_files
from simplernn_jax.config import Config, validate
from simplernn_jax.data.corpora import open_corpus
from simplernn_jax.errors import UserError, counted
from simplernn_jax.files import write_file

from ..measure import call_isolated, describe_machine
from ..tables import Results, Row, Table
from .programs import LOOKS, NANOGPT, OURS, default_programs, find_baseline
from .trainer import train_timed

TITLE = "baselines: "
TARGETS = {
    "shakespeare": ("tinyshakespeare.txt", 1.874),
    "shakespeare_gpu_budget": ("tinyshakespeare.txt", 1.4697),
    "base": ("stdlib", 1.62),
    "hour": ("stdlib", 1.45),
}
"""Text and loss, in its unit, by configuration; the first two losses are nanoGPT's."""
_CONDITIONS = ("device", "processor", "cores", "python", "jax", "torch", "settings")
"""What results of a configuration have in common, by `describe_machine`."""


class Request(NamedTuple):
    """A configuration and its baselines to train."""

    name: str
    config: Config
    seconds: float
    """Training time of each program; 0: as many steps as its settings say."""
    seeds: int
    programs: Sequence[str]
    rates: Sequence[float]
    """Learning rates to try for every baseline. A single one is used without a trial; none: that
    of its settings."""


def make_requests(
    names: Sequence[str],
    source: str | None,
    seconds: Sequence[str],
    seeds: int,
    programs: Sequence[str],
    rates: Sequence[str],
) -> list[Request]:
    """Check the flags of the command line, before hours of work.

    Raises:
      UserError: there is no configuration, seconds are neither one number of at least 0 nor one
        for each, rates are not different positive numbers; or a configuration has no text, holds
        out none of it, or has no number of steps.
    """
    if not names:
        raise UserError("--configs: name a configuration, such as base")
    limits, tried = _numbers("seconds", seconds), _numbers("rates", rates)
    if not all(0 <= limit < math.inf for limit in limits):
        raise UserError(f"--seconds={','.join(seconds)}: must be 0 or more")
    if len(limits) not in (1, len(names)):
        raise UserError(
            f"--seconds={','.join(seconds)}: {counted(len(limits), 'value')} for "
            f"{counted(len(names), 'configuration')}; give one, or one for each configuration"
        )
    if not all(0 < rate < math.inf for rate in tried) or len(set(tried)) < len(tried):
        raise UserError(f"--rates={','.join(rates)}: list different positive numbers")
    requests = []
    for name, limit in zip(names, limits * len(names), strict=False):
        config = config_files.load_config(project.ROOT / "configs" / f"{name}.py")
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
        requests.append(Request(name, config, limit, seeds, chosen, tried))
    return requests


def _numbers(flag: str, values: Sequence[str]) -> list[float]:
    try:
        return [float(value) for value in values]
    except ValueError as error:
        raise UserError(f"--{flag}={','.join(values)}: {error}; list numbers") from error


def run(requests: Sequence[Request], results: Results) -> Iterator[Table]:
    """Train all programs; tables of their configurations so far, after each program.

    Raises:
      UserError: there are results of these configurations under other conditions; or, after all
        others, programs have failed.
    """
    machine, failed = describe_machine(), []
    started = [start_results(request, results.tables, machine) for request in requests]
    for request, data in zip(requests, started, strict=True):
        with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
            for program in request.programs:
                try:
                    found = train_program(program, request, folder)
                except (subprocess.CalledProcessError, UserError) as error:
                    print(f"  {program}: {error}", flush=True)
                    failed.append(f"{program} of {request.name}")
                    continue
                for key, rows in found.items():
                    others = [row for row in data[key] if row["program"] != program]
                    data[key] = [*others, *rows]
                yield from tables_of(request.name, data)
                if results.out is not None:
                    write_file(results.out / "baselines.png", draw(results.tables))
    if failed:
        raise UserError(f"failed, with the output above: {', '.join(failed)}")


def start_results(request: Request, kept: Mapping[str, Table], machine: Row) -> Row:
    """Earlier results of a configuration, or none.

    Raises:
      UserError: those are of other seconds, another text or another machine.
    """
    config = request.config.data
    unit = "nats/char" if config.tokenizer == "char" else "bits/byte"
    conditions: Row = {"seconds": request.seconds, "source": config.source, "unit": unit}
    conditions |= {key: machine[key] for key in _CONDITIONS}
    before = kept.get(f"{TITLE}{request.name}")
    if before is None:
        return {"conditions": conditions, "runs": [], "tried": []}
    for key, old in before.data["conditions"].items():
        if old != conditions[key]:
            raise UserError(
                f"--out: its results of {request.name} have {key} {old}, these "
                f"{conditions[key]}; name another --out"
            )
    return dict(before.data)


def train_program(program: str, request: Request, folder: str) -> dict[str, list[Row]]:
    """The ``runs`` of a program, one per seed, and before those the rates that were ``tried``.

    The rate with the lowest loss on the last tenth of the training text is used. Ours are tuned in
    their configurations.
    """

    def train(rate: float | None, seed: int = 0, is_tuning: bool = False) -> Row:
        given: Row = {"config": request.config, "workdir": folder, "name": program, "rate": rate}
        given |= {"seconds": request.seconds, "seed": seed, "is_tuning": is_tuning}
        row: Row = call_isolated(train_timed, **given)
        shown = (
            f"{row['steps']:,} steps in {row['seconds']:.1f} s: {row['nats/token']:.4f} nats/token"
        )
        what = " on training text" * is_tuning
        print(f"  {program}, rate {row['rate']}, seed {seed}{what}: {shown}", flush=True)
        return row

    rates, tried = request.rates, []
    rate = None
    if program != OURS:
        rate = rates[0] if rates else find_baseline(program, request.config).rate
        if len(rates) > 1:
            tried = [train(rate, is_tuning=True) for rate in rates]
            best = min(tried, key=lambda row: (math.isnan(row["loss"]), row["loss"]))
            rate = best["rate"]
    return {"runs": [train(rate, seed) for seed in range(request.seeds)], "tried": tried}


def tables_of(name: str, data: Row) -> Iterator[Table]:
    """Tables of a configuration: its losses, and the rates that were tried."""
    seconds = data["conditions"]["seconds"]
    budget = f"{seconds:g} s each" if seconds else "steps of its settings"
    yield Table(f"{TITLE}{name}", summarize(name, data), text=f"{budget}.", data=data)
    if data["tried"]:
        rows: dict[str, Row] = {}
        for each in data["tried"]:
            row = rows.setdefault(each["program"], {"program": each["program"]})
            row[f"rate {each['rate']:g}"] = each["nats/token"]
        text = "Nats/token on the last tenth of the training text."
        yield Table(f"{TITLE}{name}, learning rates", list(rows.values()), text=text)


def seconds_until(curve: Sequence[tuple[float, float]], target: float) -> float | None:
    """Seconds when the loss first reaches `target`, interpolated; None if it never does."""
    before = None
    for seconds, loss in curve:
        if loss <= target:
            if before is None:
                return seconds
            share = (before[1] - target) / (before[1] - loss)
            return before[0] + share * (seconds - before[0])
        before = seconds, loss
    return None


def target_of(name: str, data: Row) -> float | None:
    """Loss that a configuration is to reach on its own text."""
    text, target = TARGETS.get(name, ("", None))
    return target if Path(data["conditions"]["source"]).name == text else None


def summarize(name: str, data: Row) -> list[Row]:
    """Rows of a configuration's table, medians over seeds."""
    unit, target = data["conditions"]["unit"], target_of(name, data)
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
    nanogpt = next((row for row in rows if row["program"] == NANOGPT), None)
    if nanogpt is not None and target is not None:
        theirs = nanogpt[f"seconds to {target}"]
        for row in rows:
            mine = row[f"seconds to {target}"]
            row["of nanoGPT's run"] = mine and mine / nanogpt["seconds"]
            row["of its time to that"] = mine and theirs and mine / theirs
    return rows


def plot_style(program: str) -> Row:
    """Arguments of ``plot`` for a program, the same in every picture."""
    label, color, marker, line = LOOKS[program]
    style: Row = {"label": label, "color": color, "marker": marker, "linestyle": line}
    return style | {"linewidth": 1.2, "markerfacecolor": "none", "markersize": 5}


def draw(kept: Mapping[str, Table]) -> bytes:
    """A PNG file with a panel for every configuration: loss against seconds of training."""
    found: dict[str, Any] = {
        title.removeprefix(TITLE): table.data
        for title, table in kept.items()
        if title.startswith(TITLE) and table.data
    }
    programs = dict.fromkeys(run["program"] for data in found.values() for run in data["runs"])
    columns = min(len(found), 2)
    rows = -(-len(found) // columns)
    with new_figure(5.8 * columns, 3.6 * rows) as figure:
        grid = figure.subplots(rows, columns, squeeze=False).flat
        for axes in grid[len(found) :]:
            axes.set_axis_off()
        for axes, (name, data) in zip(grid, found.items(), strict=False):
            unit, target = data["conditions"]["unit"], target_of(name, data)
            for run in data["runs"]:
                style = plot_style(run["program"]) | {"label": None}
                axes.plot(*zip(*run["curve"], strict=True), **style)
            axes.set(xscale="log", title=name, xlabel="seconds of training", ylabel=unit)
            axes.set_yscale("log", subs=[1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 6, 8])
            axes.xaxis.set_major_formatter("{x:,g}")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("{x:g}")
            if target is not None:
                axes.axhline(target, color="grey", linewidth=1)
                at = axes.get_yaxis_transform()  # x as a share of the width, y a loss
                axes.text(0.01, target, f"target {target}", va="bottom", transform=at)
            axes.grid(axis="y", which="both")
        for program in programs:
            figure.axes[0].plot([], [], **plot_style(program))
        add_legend(figure, figure.axes[0])
        return png(figure)
