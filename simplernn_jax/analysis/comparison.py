"""Comparison of training runs by what their workdirs hold: configurations, metrics and curves."""

import math
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax

from simplernn_jax.analysis.plots import add_legend, new_figure, png
from simplernn_jax.config import Config, by_field, from_json
from simplernn_jax.errors import UserError, one_line
from simplernn_jax.files import read_file
from simplernn_jax.models.language_model import abstract_model
from simplernn_jax.training.display import format_duration
from simplernn_jax.training.metrics import Row, comparable, highest_loss, loss_curves, read_metrics

_MAX_NAME = 80
_MARKERS = "osD^vPX*"
_KINDS = ("train", "validation", "held_out")


_count, _loss = "{:,.0f}".format, "{:.4f}".format
_METRICS = (
    ("steps", "any", "step", _count),
    ("training tokens", "any", "tokens", _count),
    ("training time", "any", "seconds", format_duration),
    ("tokens/s", "train", "tokens_per_second", _count),
    ("training loss, last", "train", "loss", _loss),
    ("validation loss, last", "validation", "loss", _loss),
    ("validation loss, best", "best", "loss", _loss),
    ("  at step", "best", "step", _count),
    ("  predictions", "validation", "predictions", _count),
    ("bits/byte, last", "validation", "bits_per_byte", _loss),
    ("bits/byte, best", "best", "bits_per_byte", _loss),
    ("held-out text at the end, loss", "held_out", "loss", _loss),
    ("  predictions at the end", "held_out", "predictions", _count),
    ("  bits/byte", "held_out", "bits_per_byte", _loss),
)
"""Lines of the table: label, kind of the row or `_last_rows`, field and format."""


class RunRecord(NamedTuple):
    """A training run on disk."""

    name: str
    config: Config
    rows: list[Row]
    """Rows of ``metrics.jsonl``."""


def read_runs(workdirs: Sequence[str]) -> list[RunRecord]:
    """Read the runs.

    Raises:
      UserError: a workdir is not a folder, or its config.json is invalid.
      OSError: it has no config.json.
    """
    paths = [os.path.abspath(workdir) for workdir in workdirs]
    folder = os.path.commonpath([os.path.dirname(path) for path in paths])
    names = [one_line(os.path.relpath(path, folder), _MAX_NAME) for path in paths]
    runs = []
    for path, name in zip(paths, names, strict=True):
        if not os.path.isdir(path):
            raise UserError(f"{path}: no such folder; name the workdirs of training runs")
        rows = [row for row in read_metrics(path) if row["kind"] in _KINDS]
        config = read_file(os.path.join(path, "config.json")).decode("utf-8", "replace")
        runs.append(RunRecord(name, from_json(config), rows))
    return runs


def differences(runs: Sequence[RunRecord]) -> dict[str, list[str]]:
    """Return the values of every field that is not the same in all configurations."""
    fields = [by_field(run.config) for run in runs]
    return {
        name: [repr(each[name]) for each in fields]
        for name, value in fields[0].items()
        if any(each[name] != value for each in fields)
    }


def final_metrics(runs: Sequence[RunRecord]) -> dict[str, list[str]]:
    """Return parameters, steps, speed and losses of each run, as text by name."""
    last = [_last_rows(run) for run in runs]
    models = [abstract_model(run.config.model)[1] for run in runs]
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(model)) for model in models]
    table = {"parameters": [f"{size:,}" for size in sizes]}
    for label, kind, name, text in _METRICS:
        table[label] = [_cell(rows.get(kind), name, text) for rows in last]
    return table


def _last_rows(run: RunRecord) -> dict[str, Row]:
    """Return the last row of each kind and of any kind, and the best validation row."""
    last: dict[str, Row] = {}
    for row in run.rows:
        last[row["kind"]] = last["any"] = row
    finite = [row for row in comparable(run.rows) if row.get("loss") is not None]
    if finite:
        last["best"] = min(finite, key=lambda row: (row["loss"], -row["step"]))
    return last


def _cell(row: Row | None, name: str, text: Callable[[float], str]) -> str:
    """Format a value of a row, if there is one; one that was not finite is null there."""
    if row is None or name not in row:
        return "-"
    return "not finite" if row[name] is None else text(row[name])


def draw(runs: Sequence[RunRecord]) -> bytes:
    """Draw the losses by step, and the validation's bits per byte by tokens of training, as a PNG.

    Bits per byte by tokens are comparable between tokenizers and batch sizes, losses by step only
    if both are equal.
    """
    from matplotlib.ticker import EngFormatter

    with new_figure(11, 4.2) as figure:
        left, right = figure.subplots(1, 2)
        tops = []
        for number, run in enumerate(runs):
            color, marker = f"C{number % 10}", _MARKERS[number % len(_MARKERS)]
            train, validation = loss_curves(run.rows)
            left.plot(*train, color=color, alpha=0.45, linewidth=1)
            style = {"color": color, "marker": marker, "markersize": 4}
            # Matplotlib leaves out what begins with an underscore.
            left.plot(*validation, label=f" {run.name}", **style)
            scored = [row for row in comparable(run.rows) if row.get("tokens") is not None]
            bits = [row.get("bits_per_byte") or math.nan for row in scored]
            right.plot([row["tokens"] for row in scored], bits, **style)
            tops.append(highest_loss(train, validation))
        left.set_ylim(top=max((top for top in tops if top is not None), default=None))
        left.set(xlabel="optimizer step", ylabel="loss (nats per token)")
        left.set_title("Training (thin) and validation loss")
        right.set(xlabel="tokens of training", ylabel="bits per byte")
        right.set_title("Validation, comparable across tokenizers")
        for axes in (left, right):
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
            axes.grid(visible=True, alpha=0.3)
        add_legend(figure, left, most=len(runs))
        return png(figure)
