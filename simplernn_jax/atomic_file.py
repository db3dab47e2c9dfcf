"""A file that appears whole or not at all."""

import contextlib
import os


def write_file(path: str, content: bytes) -> None:
    """Replaces the file at `path` by `content`, atomically and for good.

    Raises:
      OSError: the disk is full or not writable; what stood at `path` is still there.
    """
    temporary = f"{path}.{os.getpid()}.tmp"  # another process may be writing the same file
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise
    sync(os.path.dirname(path) or ".")


def sync(path: str | os.PathLike[str]) -> None:
    """Brings the content of a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
