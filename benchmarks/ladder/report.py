"""Table and picture of a ladder: learning rates, seeds, time to a loss, and results of all rungs.

Every training is a process of its own. A program that runs again replaces its results in the
folder.
"""

import json
import math
import statistics
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from simplernn_jax.analysis.plots import add_legend, new_figure, png
from simplernn_jax.errors import UserError
from simplernn_jax.files import write_file

from .. import tables
from ..measure import call_isolated, describe_machine
from ..tables import Row
from .peers import COMPILED, NANOGPT, OURS, find_peer
from .requests import Request
from .timed_training import train_timed

TARGETS = {
    "shakespeare": ("tinyshakespeare.txt", 1.874),
    "shakespeare_gpu_budget": ("tinyshakespeare.txt", 1.4697),
    "base": ("stdlib", 1.62),
    "hour": ("stdlib", 1.45),
}
"""Text and loss, in its unit, by rung; the first two losses are nanoGPT's."""
_FORMAT = 1
"""Format of results.json; others are refused."""
_CONDITIONS = ("device", "processor", "cores", "python", "jax", "torch", "settings")
"""What results of a rung have in common, by `describe_machine`."""
_LOOKS = {
    OURS: ("SimpleRNN (ours)", "#000000", "o", "-"),
    "lstm": ("LSTM", "#0072b2", "D", "--"),
    "gru": ("GRU", "#d55e00", "v", "-."),
    NANOGPT: ("nanoGPT (its CPU settings)", "#009e73", "s", ":"),
    f"{NANOGPT}{COMPILED}": ("nanoGPT (its CPU settings, compiled)", "#cc79a7", "^", "-"),
    "gpt_matched": ("nanoGPT (our size)", "#56b4e9", "*", "--"),
    f"gpt_matched{COMPILED}": ("nanoGPT (our size, compiled)", "#e69f00", "P", "-."),
    "gpt_gpu": ("nanoGPT (its GPU settings)", "#808080", "X", ":"),
    f"gpt_gpu{COMPILED}": ("nanoGPT (its GPU settings, compiled)", "#f0e442", "<", "-"),
}
"""Label, color, marker and line of every program: the colors of Okabe and Ito, which people with
color blindness can tell apart, and a grey."""


def run(requests: Sequence[Request], out: Path) -> None:
    """Train all programs; write results.json, table.md and ladder.png to `out` after each.

    Raises:
      UserError: results.json is not one of a ladder, or has results of these rungs under other
        conditions; or, after all others, programs have failed.
    """
    path = out / "results.json"
    results = tables.read_results(path, _FORMAT, "rungs") if path.exists() else {}
    started = [start_rung(request, results.get(request.rung), path) for request in requests]
    failed: list[str] = []
    for request, result in zip(requests, started, strict=True):
        print(f"{request.rung}:", flush=True)
        results[request.rung] = result
        with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
            for name in request.names:
                others = {
                    key: [each for each in result[key] if each["program"] != name]
                    for key in ("runs", "tried")
                }
                runs: list[Row] = []
                try:
                    rate, tried = choose_rate(name, request, folder)
                    for seed in range(request.seeds):
                        run = train(name, request, folder, rate, seed=seed)
                        runs.append(run | {"commit": result["machine"]["commit"]})
                        result |= {"runs": [*others["runs"], *runs]}
                        result |= {"tried": [*others["tried"], *tried]}
                        write(results, out)
                except (subprocess.CalledProcessError, UserError) as error:
                    print(f"  {name}: {error}", flush=True)
                    failed.append(f"{name} of {request.rung}")
        print(f"\n{page({request.rung: result})}\nwritten: {out}")
    if failed:
        raise UserError(f"failed, with the output above: {', '.join(failed)}")


def write(results: dict[str, Any], out: Path) -> None:
    """Write results.json, table.md and ladder.png."""
    content = json.dumps({"format": _FORMAT, "rungs": results}, indent=2)
    write_file(out / "results.json", f"{content}\n".encode())
    write_file(out / "table.md", page(results).encode())
    write_file(out / "ladder.png", draw(results))


def start_rung(request: Request, before: Row | None, path: Path) -> Row:
    """Results of a rung before it runs, with those `before` it.

    Raises:
      UserError: those of `path` are of other seconds, another text or another machine.
    """
    config = request.config.data
    unit = "nats/char" if config.tokenizer == "char" else "bits/byte"
    result: Row = {"seconds": request.seconds, "source": config.source, "unit": unit}
    machine = describe_machine()
    result |= {"machine": machine, "runs": [], "tried": []}
    if before is None:
        return result
    pairs = [(key, before[key], result[key]) for key in ("seconds", "source", "unit")]
    pairs += [(key, before["machine"].get(key), machine[key]) for key in _CONDITIONS]
    for key, old, new in pairs:
        if old != new:
            raise UserError(
                f"{path}: its results of {request.rung} have {key} {old}, these {new}; name "
                "another --out"
            )
    return result | {key: before[key] for key in ("runs", "tried")}


def train(name: str, request: Request, folder: str, rate: float | None, **options: Any) -> Row:
    """One training in a fresh process."""
    given: Row = {"config": request.config, "workdir": folder, "name": name, "rate": rate}
    row: Row = call_isolated(train_timed, **given, seconds=request.seconds, **options)
    shown = f"{row['steps']:,} steps in {row['seconds']:.1f} s: {row['loss']:.4f}"
    print(f"  {name}, rate {row['rate']}, {options}: {shown} nats/token", flush=True)
    return row


def choose_rate(name: str, request: Request, folder: str) -> tuple[float | None, list[Row]]:
    """The rate with the lowest loss on the last tenth of the training text, and all trainings.

    Without several rates there is nothing to try; ours are tuned in their configurations.
    """
    if name == OURS:
        return None, []
    if len(request.rates) < 2:
        rate = request.rates[0] if request.rates else find_peer(name, request.config).rate
        return rate, []
    tried = [train(name, request, folder, rate, is_tuning=True) for rate in request.rates]
    return min(tried, key=lambda row: (math.isnan(row["loss"]), row["loss"]))["rate"], tried


def factor_of(run: Row, unit: str) -> float:
    """Number of `unit` in a nat/token."""
    return 1.0 if unit == "nats/char" else float(run["bits/byte per nat"])


def curve_of(run: Row, unit: str) -> list[tuple[float, float]]:
    """Seconds and loss in `unit`.

    Losses of a part of the held-out text are shifted so that the last is that of the whole.
    """
    shift = run["loss"] - run["curve"][-1][1]
    shift = shift if math.isfinite(shift) else 0.0
    return [(seconds, (loss + shift) * factor_of(run, unit)) for seconds, loss in run["curve"]]


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


def target_of(rung: str, result: Row) -> float | None:
    """Loss that a rung is to reach on its own text."""
    text, target = TARGETS.get(rung, ("", None))
    return target if Path(result["source"]).name == text else None


def summarize(rung: str, result: Row) -> list[Row]:
    """Rows of a rung's table, medians over seeds."""
    unit, target = result["unit"], target_of(rung, result)
    by_name: dict[str, list[Row]] = {}
    for each in result["runs"]:
        by_name.setdefault(each["program"], []).append(each)
    rows: list[Row] = []
    for name, runs in by_name.items():
        curves = [curve_of(each, unit) for each in runs]
        losses = [each["loss"] * factor_of(each, unit) for each in runs]
        row: Row = {"program": name} | {key: runs[0][key] for key in ("parameters", "rate")}
        row["steps"] = round(statistics.median(each["steps"] for each in runs))
        row["seconds"] = statistics.median(each["seconds"] for each in runs)
        row |= {unit: statistics.median(losses), "range": max(losses) - min(losses)}
        blocks = [each["random blocks"] for each in runs if each["random blocks"] is not None]
        row["random blocks"] = (
            statistics.median(blocks) * factor_of(runs[0], unit) if blocks else None
        )
        if target is not None:
            reached = [seconds_until(curve, target) for curve in curves]
            times = [seconds for seconds in reached if seconds is not None]
            complete = len(times) == len(reached)
            row[f"seconds to {target}"] = statistics.median(times) if complete else None
        rows.append(row)
    nanogpt = next((row for row in rows if row["program"] == NANOGPT), None)
    if nanogpt is not None and target is not None:
        for row in rows:
            mine = row[f"seconds to {target}"]
            row["of nanoGPT's run"] = mine and mine / nanogpt["seconds"]
            theirs = nanogpt[f"seconds to {target}"]
            row["of its time to that"] = mine and theirs and mine / theirs
    return rows


def page(results: dict[str, Any]) -> str:
    """Tables of all rungs in Markdown."""
    parts = []
    for rung, result in results.items():
        budget = f"{result['seconds']:g} s each" if result["seconds"] else "steps of its settings"
        parts.append(f"## {rung}: {budget}\n\n{tables.markdown(summarize(rung, result))}")
        if result["tried"]:
            parts.append(tables.markdown(tried_rows(result["tried"])))
    return "\n".join(parts)


def tried_rows(tried: Sequence[Row]) -> list[Row]:
    """Nats/token on the last tenth of the training text, by program and learning rate."""
    rows: dict[str, Row] = {}
    for each in tried:
        row = rows.setdefault(each["program"], {"program": each["program"]})
        row[f"rate {each['rate']:g}"] = each["loss"]
    return list(rows.values())


def plot_style(name: str) -> Row:
    """Arguments of ``plot`` for a program, the same in every picture."""
    label, color, marker, line = _LOOKS[name]
    style: Row = {"label": label, "color": color, "marker": marker, "linestyle": line}
    return style | {"linewidth": 1.2, "markerfacecolor": "none", "markersize": 5}


def draw(results: dict[str, Any]) -> bytes:
    """A PNG file with a panel for every rung: loss against seconds of training."""
    names = dict.fromkeys(run["program"] for each in results.values() for run in each["runs"])
    columns = min(len(results), 2)
    rows = -(-len(results) // columns)
    with new_figure(5.8 * columns, 3.6 * rows) as figure:
        grid = figure.subplots(rows, columns, squeeze=False).flat
        for axes in grid[len(results) :]:
            axes.set_axis_off()
        for axes, (rung, result) in zip(grid, results.items(), strict=False):
            for run in result["runs"]:
                curve = curve_of(run, result["unit"])
                style = plot_style(run["program"]) | {"label": None}
                axes.plot(*zip(*curve, strict=True), **style)
            axes.set(xscale="log", title=rung, xlabel="seconds of training", ylabel=result["unit"])
            axes.set_yscale("log", subs=[1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 6, 8])
            axes.xaxis.set_major_formatter("{x:,g}")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("{x:g}")
            target = target_of(rung, result)
            if target is not None:
                axes.axhline(target, color="grey", linewidth=1)
                at = axes.get_yaxis_transform()  # x as a share of the width, y a loss
                axes.text(0.01, target, f"target {target}", va="bottom", transform=at)
            axes.grid(axis="y", which="both")
        for name in names:
            figure.axes[0].plot([], [], **plot_style(name))
        add_legend(figure, figure.axes[0])
        return png(figure)
