"""Metrics of a run on disk: one JSON object per line, TensorBoard events, and the loss curve.

Every row of ``metrics.jsonl`` has ``step``, ``kind`` and ``wall_time`` (Unix time in seconds), and:

- ``train``: ``loss`` (nats per token; mean over all predictions since the previous row, excluding
  skipped updates), ``gradient_norm`` (of this step, before clipping), ``learning_rate``,
  ``tokens`` (predictions since step 0), ``seconds`` (of training since step 0, excluding
  evaluations, samples and saves), ``tokens_per_second`` and ``skipped_updates`` so far.
- ``validation``: ``loss``, ``bits_per_byte``, ``predictions`` (number scored; the same tokens at
  every evaluation, the last step included), ``tokens``, ``seconds``.
- ``held_out``: the same at the end, of all held-out text or of ``train.held_out_tokens``.
- ``sample``: ``text``.
"""

import io
import json
import math
import os
import time
from collections.abc import Iterable, Sequence
from typing import Any

from simplernn_jax.errors import one_line
from simplernn_jax.files import open_file, write_file

FILE_NAME = "metrics.jsonl"

FLUSH_SECONDS = 30.0
"""Time between flushes of events to the disk, which may be slow."""

Row = dict[str, Any]

_BEGINNING, _HEADROOM = 0.1, 0.35
"""Fraction of initial steps whose losses may be clipped by the y-axis; space above the others, as a
fraction of their range."""

Series = tuple[list[int], list[float]]
"""Steps and losses; a loss that was not finite is NaN, a gap in the curve."""


class MetricsWriter:
    """Appends to ``metrics.jsonl`` and to TensorBoard files under ``tensorboard``.

    A resumed run first drops rows of steps after its checkpoint, so that no step is logged twice.
    Re-evaluating a finished run does not duplicate rows.

    Raises:
      OSError: a file cannot be written.
    """

    def __init__(self, workdir: str, first_step: int):
        """Open the files of `workdir`; rows of steps after `first_step` are dropped."""
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import SessionLog

        path = os.path.join(workdir, FILE_NAME)
        rows = [row for row in read_metrics(workdir) if row["step"] <= first_step]
        self.seconds: float = max((row.get("seconds") or 0.0 for row in rows), default=0.0)
        """Training time up to the last row that is kept."""
        self._known = {_key(row) for row in rows if row["step"] == first_step}
        write_file(path, b"".join(map(encode, rows)))
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - closed by `close`
        # TensorBoard discards the steps of earlier files from this one on. Events are written in
        # this thread: on a full disk, the thread of `tensorboardX.SummaryWriter` dies, and later
        # calls block forever.
        folder = os.path.join(workdir, "tensorboard")
        os.makedirs(folder, exist_ok=True)
        self._events = EventsWriter(os.path.join(folder, "events"), f".{os.getpid()}")
        self._flushed_at = 0.0
        start = SessionLog(status=SessionLog.START)
        self._write_event(step=first_step + 1, session_log=start)

    def write(self, step: int, kind: str, **values: Any) -> None:
        """Write one row: numbers go to TensorBoard as scalars, text as text, named ``KIND/NAME``.

        In the file, a number that is not finite is null: JSON cannot represent it.
        A row of this step, kind and number of scored tokens from an earlier run is kept instead.
        """
        from tensorboardX import summary

        row = {"step": step, "kind": kind, **values, "wall_time": round(time.time(), 3)}
        if _key(row) in self._known:
            return
        self._file.write(encode(row))
        for name, value in values.items():
            make = summary.text if isinstance(value, str) else summary.scalar
            self._write_event(step=step, summary=make(f"{kind}/{name}", value))
        if time.monotonic() - self._flushed_at > FLUSH_SECONDS:
            self._events.flush()
            self._flushed_at = time.monotonic()

    def close(self) -> None:
        """Close ``metrics.jsonl`` and the event file."""
        self._file.close()
        self._events.close()

    def _write_event(self, **fields: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._events.write_event(Event(wall_time=time.time(), **fields))


def read_metrics(workdir: str) -> list[Row]:
    """Return the rows of ``metrics.jsonl`` of a run, which docs/training.md describes.

    Lines that are not rows are left out, such as the last one if the run was killed while it wrote.
    There are none if there is no such file.
    """
    try:
        with open_file(os.path.join(workdir, FILE_NAME)) as file:
            return [row for line in file if (row := _decode(line)) is not None]
    except FileNotFoundError:
        return []


def encode(row: Row) -> bytes:
    """Return the line of a row; numbers that are not finite, which JSON lacks, become null."""
    values = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }
    return json.dumps(values, allow_nan=False).encode() + b"\n"


def _decode(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    is_row = isinstance(row, dict) and isinstance(row.get("step"), int) and "kind" in row
    return row if is_row else None


def _key(row: Row) -> tuple[int, str, Any]:
    return row["step"], row["kind"], row.get("predictions")


def plot_loss(workdir: str, model: str) -> str:
    """Plot training and validation loss from ``metrics.jsonl``; `model` is named in the title.

    The loss axis is scaled to the losses after the first steps, and the best validation loss is
    marked with its value.

    Returns:
      The plot's path.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator

    train, validation = loss_curves(read_metrics(workdir))
    # Large type stays readable in a thumbnail.
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    if train[0]:
        axes.plot(*train, linewidth=1.2, color="#9ab8d8", label="training")
    if validation[0]:
        axes.plot(*validation, marker="o", markersize=5, color="#c44e17", label="validation")
    points = [(loss, -step) for step, loss in zip(*validation, strict=True) if loss == loss]
    if points:
        loss, step = min(points)[0], -min(points)[1]
        # The value is in the legend: next to the point it would cover a curve.
        label = f"best {loss:.3f} at step {step:,}"
        axes.plot(step, loss, "ko", markersize=12, markerfacecolor="none", label=label)
    axes.set_ylim(top=highest_loss(train, validation))
    title = f"{os.path.basename(os.path.abspath(workdir))}: {model}"
    axes.set_title(one_line(title, 75), fontsize=15, parse_math=False)
    axes.set_xlabel("optimizer step", fontsize=15)
    axes.set_ylabel("loss (nats per token)", fontsize=15)
    axes.tick_params(labelsize=14)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axes.grid(alpha=0.3)
    if train[0] or validation[0]:
        figure.legend(fontsize=14, loc="outside lower center", ncols=3, frameon=False)
    path = os.path.join(workdir, "loss_curve.png")
    content = io.BytesIO()
    figure.savefig(content, dpi=120)
    write_file(path, content.getvalue())
    return path


def loss_curves(rows: Iterable[Row]) -> tuple[Series, Series]:
    """Return training losses and losses of `comparable` evaluations, from ``metrics.jsonl``."""
    rows = [row for row in rows if "loss" in row]
    train = [row for row in rows if row["kind"] == "train"]
    return _series(train), _series(comparable(rows))


def comparable(rows: Sequence[Row]) -> list[Row]:
    """Return the rows of validation that scored the same tokens as the last one.

    They differ only where a resumed run has another ``eval_tokens``.
    """
    evaluations = [row for row in rows if row["kind"] == "validation"]
    last = evaluations[-1].get("predictions") if evaluations else None
    return [row for row in evaluations if row.get("predictions") == last]


def highest_loss(*curves: Series) -> float | None:
    """Return the top of a loss axis that shows all losses except high ones at the start."""
    points = [point for curve in curves for point in zip(*curve, strict=True)]
    newest = max((step for step, _ in points), default=0)
    losses = [loss for step, loss in points if math.isfinite(loss) and step >= _BEGINNING * newest]
    return max(losses) + _HEADROOM * (max(losses) - min(losses)) + 0.01 if losses else None


def _series(rows: Sequence[Row]) -> Series:
    losses = [math.nan if row["loss"] is None else row["loss"] for row in rows]
    return [row["step"] for row in rows], losses
