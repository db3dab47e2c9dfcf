"""Files that a run appends to and can do without."""

import os

from absl import logging

from simplernn_jax.files import check_output


class AppendOnlyFile:
    """Regular file that whole lines are appended to; a failure is one warning, never an exception.

    Opened by the first write. After a failed write the next ones try again, each on a new line.
    """

    def __init__(self, path: str, limit: int | None = None) -> None:
        """Name the file; it grows to at most `limit` bytes, and lines beyond are dropped."""
        self._path = path
        self._limit = limit
        self._descriptor: int | None = None
        self._failed = False

    def write(self, line: bytes) -> None:
        """Append a line, which ends in a newline."""
        try:
            if self._descriptor is None:
                self._descriptor = self._open()
            size = os.fstat(self._descriptor).st_size
            if self._limit is not None and size + len(line) > self._limit:
                return
            rest = memoryview(b"\n" + line if self._failed else line)
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
        except OSError as error:
            if not self._failed:
                logging.warning("%s: %s; lines are lost", self._path, error.strerror or error)
            self._failed = True

    def close(self) -> None:
        """Close the file."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _open(self) -> int:
        check_output(self._path)
        # Without O_NONBLOCK, a fifo that has just come there would block.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC
        return os.open(self._path, flags, 0o666)


def move_aside(path: str) -> bool:
    """Rename whatever is at `path` to a free name beside it; a failure is a warning and False."""
    number, target = 1, f"{path}.unusable"
    while os.path.lexists(target):
        number += 1
        target = f"{path}.unusable-{number}"
    try:
        os.rename(path, target)
    except OSError as error:
        logging.warning("%s: cannot be moved away: %s", path, error.strerror or error)
        return False
    logging.warning("%s: moved to %s", path, target)
    return True
