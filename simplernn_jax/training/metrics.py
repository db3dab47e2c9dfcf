"""Metrics of a run on disk: one JSON object per line, and TensorBoard events.

Every row of ``metrics.jsonl`` has ``step``, ``kind`` and ``wall_time`` (Unix time in seconds), and:

- ``train``: ``loss`` (nats per token; mean over all predictions since the previous row, excluding
  skipped updates), ``gradient_norm`` (of this step, before clipping), ``learning_rate``,
  ``tokens`` (predictions since step 0), ``seconds`` (of training since step 0, excluding
  evaluations, samples and saves), ``tokens_per_second``, ``skipped_updates`` and
  ``recompilations`` so far.
- ``validation``: ``loss``, ``bits_per_byte``, ``predictions`` (number scored; the same tokens at
  every evaluation, the last step included), ``tokens``, ``seconds``.
- ``held_out``: the same of the whole validation split, at the end.
- ``sample``: ``text``.
"""

import json
import math
import os
import time
from typing import Any

from simplernn_jax.files import open_file, write_file

FILE_NAME = "metrics.jsonl"

FLUSH_SECONDS = 30.0
"""Time between flushes of events to the disk, which may be slow."""

Row = dict[str, Any]


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
    if not isinstance(row, dict) or not isinstance(row.get("kind"), str):
        return None
    numbers = {name: value for name, value in row.items() if name not in ("kind", "text")}
    is_valid = type(row.get("step")) is int and all(map(_is_number, numbers.values()))
    return row if is_valid else None


def _is_number(value: object) -> bool:
    return value is None or (type(value) in (int, float) and abs(value) < 2**63)  # type: ignore[arg-type]


def _key(row: Row) -> tuple[int, str, Any]:
    return row["step"], row["kind"], row.get("predictions")
