"""Metrics of a run on disk: one JSON object a line, and TensorBoard events.

Every row of ``metrics.jsonl`` has ``step``, ``kind`` and ``wall_time`` (Unix time in seconds), and:

- ``train``: ``loss`` (nats per token; the mean over all predictions since the row before, updates
  that were skipped left out), ``gradient_norm`` (of this step, before clipping), ``learning_rate``,
  ``tokens`` (predictions since step 0), ``seconds`` (of training since step 0, without evaluations,
  samples and saves), ``tokens_per_second``, ``skipped_updates`` and ``recompilations`` so far.
- ``validation``: ``loss``, ``bits_per_byte``, ``predictions`` (number scored), ``tokens``,
  ``seconds``.
- ``sample``: ``text``.
"""

import math
import os
import time
from collections.abc import Iterator
from typing import Any

from absl import logging

from simplernn_jax.errors import counted
from simplernn_jax.files import open_file, replaced_file
from simplernn_jax.training.append_only import AppendOnlyFile, move_aside
from simplernn_jax.training.metrics_lines import Row, encode, rows_of
from simplernn_jax.training.tensorboard import EventLog

FILE_NAME = "metrics.jsonl"
DAMAGED = ".damaged"
"""Suffix of the file that gets the damaged lines of a log."""

MOST_DAMAGED_BYTES = 1 << 26


class MetricsWriter:
    """Appends to ``metrics.jsonl`` and to TensorBoard files under ``tensorboard``.

    A resumed run first drops what an interrupted one wrote after its last checkpoint, so that
    every step stands there once. What a finished run measures again is not written twice.

    Neither file ever stops a run: damaged lines go to ``metrics.jsonl.damaged``, what is no
    readable file is renamed, and a failure to write is a warning.
    """

    def __init__(self, workdir: str, first_step: int):
        """Open the files of `workdir`; rows of steps after `first_step` are dropped."""
        self.seconds = 0.0
        """Of training, up to the last row that is kept."""
        self._first_step = first_step
        self._known: set[str] = set()
        """Kinds of the rows of `first_step`."""
        path = os.path.join(workdir, FILE_NAME)
        self._file = AppendOnlyFile(path) if self._keep_rows(path) else None
        self._events = EventLog(workdir, first_step)

    def _keep_rows(self, path: str) -> bool:
        """Drop what does not stay; False if the file cannot be written to."""
        if not os.path.lexists(path):
            return True
        try:
            file = open_file(path)
        except OSError as error:
            logging.warning("%s: %s; starting a new one", path, error.strerror or error)
            return move_aside(path)
        number, damaged = 0, AppendOnlyFile(path + DAMAGED, limit=MOST_DAMAGED_BYTES)
        try:
            with file, replaced_file(path) as kept:
                for line, row in rows_of(file):
                    if row is None:
                        number += 1
                        damaged.write(line.rstrip(b"\n") + b"\n")
                    elif row["step"] <= self._first_step:
                        self._note(row)
                        kept.write(encode(row))
        except OSError as error:
            reason = error.strerror or error
            logging.warning("%s: %s; the rows of this run are not written", path, reason)
            return False
        finally:
            damaged.close()
        if number:
            lines = counted(number, "damaged line")
            logging.warning("%s: %s moved to %s", path, lines, path + DAMAGED)
        return True

    def _note(self, row: Row) -> None:
        if row["step"] == self._first_step:
            self._known.add(row["kind"])
        seconds = row.get("seconds")
        if isinstance(seconds, int | float) and math.isfinite(seconds):
            self.seconds = max(self.seconds, seconds)

    def write(self, step: int, kind: str, **values: Any) -> None:
        """Write one row: numbers go to TensorBoard as scalars, text as text.

        In the file, a number that is not finite is null: JSON has none such.
        A row of this step and kind that an earlier run wrote stays instead.
        """
        if step == self._first_step and kind in self._known:
            return
        row = {"step": step, "kind": kind, **values, "wall_time": round(time.time(), 3)}
        if self._file is not None:
            self._file.write(encode(row))
        self._events.add(step, kind, values)

    def close(self) -> None:
        """Close both."""
        if self._file is not None:
            self._file.close()
        self._events.close()


class NoMetrics:
    """Writes nothing: of several processes, only process 0 does."""

    seconds = 0.0

    def write(self, step: int, kind: str, **values: Any) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


def iterate_metrics(workdir: str) -> Iterator[Row]:
    """Yield the rows of ``metrics.jsonl``, damaged ones left out; none if it is not readable."""
    try:
        with open_file(os.path.join(workdir, FILE_NAME)) as file:
            for _, row in rows_of(file):
                if row is not None:
                    yield row
    except FileNotFoundError:
        return
    except OSError as error:
        logging.warning("%s: %s", os.path.join(workdir, FILE_NAME), error.strerror or error)


def read_metrics(workdir: str) -> list[Row]:
    """Return all rows of `iterate_metrics`."""
    return list(iterate_metrics(workdir))
