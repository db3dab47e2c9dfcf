"""TensorBoard event files of a run."""

import contextlib
import os
import socket
import time
from collections.abc import Mapping
from typing import Any

from absl import logging

FOLDER = "tensorboard"

FLUSH_SECONDS = 30.0
"""Time between flushes to the disk, which may be slow."""


class EventLog:
    """Event file below ``WORKDIR/tensorboard``; one warning and no more events if it fails.

    Written in the calling thread: tensorboardX's writer thread dies on a full disk, and later `add`
    calls block forever.
    """

    def __init__(self, workdir: str, first_step: int) -> None:
        """Open a file; its SessionLog.START event discards later steps of earlier files."""
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.record_writer import RecordWriter

        self._folder = os.path.join(workdir, FOLDER)
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}"
        start = SessionLog(status=SessionLog.START)
        self._writer: RecordWriter | None = None
        self._flushed_at = 0.0
        try:
            os.makedirs(self._folder, exist_ok=True)
            self._writer = RecordWriter(os.path.join(self._folder, name))
            self._write(Event(file_version="brain.Event:2", wall_time=time.time()))
            self._write(Event(step=first_step + 1, session_log=start, wall_time=time.time()))
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
                if value is None:  # unknown after an early version's checkpoint
                    continue
                make = summary.text if isinstance(value, str) else summary.scalar
                content = make(f"{kind}/{name}", value)
                self._write(Event(step=step, wall_time=time.time(), summary=content))
            if time.monotonic() - self._flushed_at > FLUSH_SECONDS:
                self._writer.flush()
                self._flushed_at = time.monotonic()
        except OSError as error:
            self._give_up(error)

    def close(self) -> None:
        """Flush and close the file."""
        if self._writer is None:
            return
        try:
            self._writer.flush()
            self._writer.close()
        except OSError as error:
            self._give_up(error)
        self._writer = None

    def _write(self, event: Any) -> None:
        assert self._writer is not None
        self._writer.write(event.SerializeToString())

    def _give_up(self, error: OSError) -> None:
        reason = error.strerror or error
        logging.warning("%s: %s; no more TensorBoard events of this run", self._folder, reason)
        writer, self._writer = self._writer, None
        if writer is not None:
            with contextlib.suppress(OSError):
                writer.close()
