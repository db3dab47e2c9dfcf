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

The last value of a line is the CRC-32 of the row without it, as `json.dumps` formats it.

    {"step": 20, "kind": "train", "loss": 3.1, ..., "crc32": "5f3a0c11"}
"""

import contextlib
import json
import math
import os
import socket
import sys
import time
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

from absl import logging

from simplernn_jax.errors import counted
from simplernn_jax.files import check_output, open_file, replaced_file

FILE_NAME = "metrics.jsonl"
CORRUPT_SUFFIX = ".damaged"
"""Suffix of the file that receives corrupt lines."""

FLUSH_SECONDS = 30.0
"""Time between flushes of events to the disk, which may be slow."""

MAX_LINE_BYTES = 1 << 24

Row = dict[str, Any]


class MetricsWriter:
    """Appends to ``metrics.jsonl`` and to TensorBoard files under ``tensorboard``.

    A resumed run first drops rows of steps after its checkpoint, so that no step is logged twice.
    Re-evaluating a finished run does not duplicate rows.

    Neither file ever stops a run, unlike with `clu.metric_writers`: corrupt lines go to
    ``metrics.jsonl.damaged``, and a failure to read or write is a warning.
    """

    def __init__(self, workdir: str, first_step: int):
        """Open the files of `workdir`; rows of steps after `first_step` are dropped."""
        self.seconds = 0.0
        """Training time up to the last row that is kept."""
        self._first_step = first_step
        self._known: set[tuple[str, Any]] = set()
        """Kinds and numbers of scored tokens of the rows of `first_step`."""
        path = os.path.join(workdir, FILE_NAME)
        self._file = _AppendOnlyFile(path) if self._keep_rows(path) else None
        self._events = EventLog(workdir, first_step)

    def _keep_rows(self, path: str) -> bool:
        """Drop later and corrupt rows; False if the file cannot be read or written to."""
        if not os.path.lexists(path):
            return True
        number, corrupt = 0, _AppendOnlyFile(path + CORRUPT_SUFFIX)
        try:
            with open_file(path) as file, replaced_file(path) as output:
                for line, row in decode_lines(file):
                    if row is None:
                        number += 1
                        corrupt.write(line.rstrip(b"\n") + b"\n")
                    elif row["step"] <= self._first_step:
                        self._note(row)
                        output.write(encode(row))
        except OSError as error:
            reason = error.strerror or error
            logging.warning("%s: %s; the rows of this run are not written", path, reason)
            return False
        finally:
            corrupt.close()
        if number:
            lines = counted(number, "corrupted line")
            logging.warning("%s: %s moved to %s", path, lines, path + CORRUPT_SUFFIX)
        return True

    def _note(self, row: Row) -> None:
        if row["step"] == self._first_step:
            self._known.add((row["kind"], row.get("predictions")))
        seconds = row.get("seconds")
        if isinstance(seconds, int | float) and math.isfinite(seconds):
            self.seconds = max(self.seconds, seconds)

    def write(self, step: int, kind: str, **values: Any) -> None:
        """Write one row: numbers go to TensorBoard as scalars, text as text.

        In the file, a number that is not finite is null: JSON cannot represent it.
        A row of this step, kind and number of scored tokens from an earlier run is kept instead.
        """
        if step == self._first_step and (kind, values.get("predictions")) in self._known:
            return
        row = {"step": step, "kind": kind, **values, "wall_time": round(time.time(), 3)}
        if self._file is not None:
            self._file.write(encode(row))
        self._events.add(step, kind, values)

    def close(self) -> None:
        """Close ``metrics.jsonl`` and the event file."""
        if self._file is not None:
            self._file.close()
        self._events.close()


def read_metrics(workdir: str) -> list[Row]:
    """Return the rows of ``metrics.jsonl`` of a run, which docs/training.md describes.

    Corrupt rows are left out; there are none if the file cannot be read.
    """
    path = os.path.join(workdir, FILE_NAME)
    try:
        with open_file(path) as file:
            return [row for _, row in decode_lines(file) if row is not None]
    except FileNotFoundError:
        return []
    except OSError as error:
        logging.warning("%s: %s", path, error.strerror or error)
        return []


def encode(row: Row) -> bytes:
    """Return the line of a row; numbers that are not finite, which JSON lacks, become null."""
    values = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }
    return json.dumps(values | {"crc32": _checksum(values)}, allow_nan=False).encode() + b"\n"


def decode_lines(file: BinaryIO) -> Iterator[tuple[bytes, Row | None]]:
    """Yield each nonblank line with its row, or None if it is corrupt.

    At most one line is in memory; lines longer than `MAX_LINE_BYTES` are truncated.
    """
    while line := file.readline(MAX_LINE_BYTES):
        rest = line
        while len(rest) == MAX_LINE_BYTES and not rest.endswith(b"\n"):
            rest = file.readline(MAX_LINE_BYTES)
        if len(line) < MAX_LINE_BYTES and not line.strip():
            continue
        yield line, _decode(line)


def _decode(line: bytes) -> Row | None:
    try:
        row = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or not all(map(_is_value, row.values())):
        return None
    step = row.get("step")
    if type(step) is not int or step < 0 or not isinstance(row.get("kind"), str):
        return None
    if isinstance(row.get("loss"), str):
        return None
    return row if row.pop("crc32", None) == _checksum(row) else None


def _is_value(value: Any) -> bool:
    if type(value) is int:
        return abs(value) < 2**63
    return value is None or type(value) in (float, str)


def _checksum(row: Row) -> str:
    return f"{zlib.crc32(json.dumps(row).encode()):08x}"


class _AppendOnlyFile:
    """Regular file that whole lines are appended to; a failure is one warning, never an exception.

    Opened by the first write. After a failed write the next ones try again, each on a new line.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._descriptor: int | None = None
        self._failed = False

    def write(self, line: bytes) -> None:
        """Append a line, which ends in a newline."""
        try:
            if self._descriptor is None:
                check_output(self._path)
                # Without O_NONBLOCK, opening a FIFO would block.
                flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC
                self._descriptor = os.open(self._path, flags, 0o666)
            rest = memoryview(b"\n" + line if self._failed else line)
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
        except OSError as error:
            if not self._failed:
                logging.warning("%s: %s; rows are lost", self._path, error.strerror or error)
            self._failed = True

    def close(self) -> None:
        """Close the file."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


class EventLog:
    """Event file below ``WORKDIR/tensorboard``; one warning and no more events if it fails.

    Written in the calling thread: tensorboardX's writer thread dies on a full disk, and later `add`
    calls block forever.
    """

    def __init__(self, workdir: str, first_step: int) -> None:
        """Open a file; its SessionLog.START event discards later steps of earlier files."""
        self._folder = os.path.join(workdir, "tensorboard")
        self._writer: Any = None
        self._flushed_at = 0.0
        sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
        try:  # without PyTorch, which may be slow or fail to load, and which nothing here needs
            from tensorboardX.proto.event_pb2 import Event, SessionLog
            from tensorboardX.record_writer import RecordWriter
        finally:
            if sys.modules["torch"] is None:
                del sys.modules["torch"]
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}"
        start = SessionLog(status=SessionLog.START)
        try:
            os.makedirs(self._folder, exist_ok=True)
            self._writer = RecordWriter(os.path.join(self._folder, name))
            self._write(Event(file_version="brain.Event:2"))
            self._write(Event(step=first_step + 1, session_log=start))
        except OSError as error:
            self._give_up(error)

    def add(self, step: int, kind: str, values: Mapping[str, object]) -> None:
        """Add numbers as scalars and text as text, named ``KIND/NAME``."""
        if self._writer is None:
            return
        from tensorboardX import summary
        from tensorboardX.proto.event_pb2 import Event

        try:
            for name, value in values.items():
                make = summary.text if isinstance(value, str) else summary.scalar
                self._write(Event(step=step, summary=make(f"{kind}/{name}", value)))
            if time.monotonic() - self._flushed_at > FLUSH_SECONDS:
                self._writer.flush()
                self._flushed_at = time.monotonic()
        except OSError as error:
            self._give_up(error)

    def close(self) -> None:
        """Flush and close the file."""
        try:
            if self._writer is not None:
                self._writer.flush()
                self._writer.close()
        except OSError as error:
            self._give_up(error)
        self._writer = None

    def _write(self, event: Any) -> None:
        event.wall_time = time.time()
        self._writer.write(event.SerializeToString())

    def _give_up(self, error: OSError) -> None:
        reason = error.strerror or error
        logging.warning("%s: %s; no more TensorBoard events of this run", self._folder, reason)
        writer, self._writer = self._writer, None
        if writer is not None:
            with contextlib.suppress(OSError):
                writer.close()
