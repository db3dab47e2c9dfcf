"""TensorBoard event files of a run."""

import contextlib
import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from absl import logging

if TYPE_CHECKING:
    pass

FOLDER = "tensorboard"

FLUSH_SECONDS = 30.0
"""Time between flushes to the disk, which may be slow."""


class EventLog:
    """Event file below ``WORKDIR/tensorboard``; one warning and no more events if it fails.

    Written in the calling thread: tensorboardX's own thread dies when it meets a full disk, and
    whoever adds more events then waits for it forever.
    """

    def __init__(self, workdir: str, first_step: int) -> None:
        """Open a new file, which hides events after `first_step` that earlier ones hold."""
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self._folder = os.path.join(workdir, FOLDER)
        self._writer: EventsWriter | None = None
        self._flushed_at = 0.0
        start = SessionLog(status=SessionLog.START)
        try:
            os.makedirs(self._folder, exist_ok=True)
            self._writer = EventsWriter(os.path.join(self._folder, "events"), f".{os.getpid()}")
            event = Event(step=first_step + 1, session_log=start, wall_time=time.time())
            self._writer.write_event(event)
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
                content = make(f"{kind}/{name}", value)
                self._writer.write_event(Event(step=step, wall_time=time.time(), summary=content))
            if time.monotonic() - self._flushed_at > FLUSH_SECONDS:
                self._writer.flush()
                self._flushed_at = time.monotonic()
        except OSError as error:
            self._give_up(error)

    def close(self) -> None:
        """Flush and close the file."""
        try:
            if self._writer is not None:
                self._writer.close()
            self._writer = None
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        reason = error.strerror or error
        logging.warning("%s: %s; no more TensorBoard events of this run", self._folder, reason)
        writer, self._writer = self._writer, None
        if writer is not None:
            with contextlib.suppress(OSError):
                writer.close()
