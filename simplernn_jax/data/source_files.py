"""Files of a corpus, read one at a time: plain, ``.gz`` and ``.zst``."""

import contextlib
import dataclasses
import gzip
import io
import os
import zlib
from collections.abc import Iterator
from typing import IO, Any, BinaryIO

from simplernn_jax.errors import UserError
from simplernn_jax.files import open_file

COMPRESSED_SUFFIXES = (".gz", ".zst")
_ZSTD_BLOCK = 1 << 8
"""Compressed bytes per read. They become at most 32,768 times as many, 8 MiB."""
_ZSTD_WINDOW = 1 << 31
"""Bytes that a frame may refer back to: all that ``zstd --long=31`` writes, which needs as much
memory."""


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """A file of a corpus."""

    name: str
    """Path below the folder or glob it was found by; part of the fingerprint."""
    path: str


class _DamagedArchive(Exception):
    """Reason why a compressed file cannot be read."""


@contextlib.contextmanager
def open_source(path: str) -> Iterator[tuple[IO[bytes], BinaryIO]]:
    """Open a regular file of the user's; the block does nothing with files but read this one.

    Yields the decompressed stream and the file itself. Compressed files are decompressed while they
    are read, a bounded number of bytes at a time.

    Raises:
      UserError: it cannot be opened or read, or is a corrupted or truncated archive.
    """
    try:
        with open_file(path) as file:
            yield _decompressed(path, file), file
    except (EOFError, zlib.error, gzip.BadGzipFile, _DamagedArchive) as error:
        raise UserError(
            f"{path}: corrupted or truncated ({error}); replace it by a whole copy"
        ) from error
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; make it readable or leave it out") from error


def file_status(path: str) -> os.stat_result:
    """Return size and times of a file of a corpus; raises `UserError` if it is gone."""
    try:
        return os.stat(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; put it back and run again") from error


@contextlib.contextmanager
def library_errors(
    problem: str, advice: str, passed: type[Exception] = UserError
) -> Iterator[None]:
    """Turn what a library raises for corrupted files, which can be anything, into a `UserError`.

    Its message is ``PROBLEM (error); ADVICE``; `passed` and `MemoryError` are raised unchanged.
    """
    try:
        yield
    except (UserError, MemoryError, passed):
        raise
    except Exception as error:
        raise UserError(f"{problem} ({type(error).__name__}: {error}); {advice}") from error


def _decompressed(path: str, file: BinaryIO) -> Any:
    suffix = os.path.splitext(path)[1].lower()
    if suffix == ".gz":
        return gzip.GzipFile(fileobj=file)
    if suffix == ".zst":
        return io.BufferedReader(_ZstdReader(file))
    return file


class _ZstdReader(io.RawIOBase):
    """Consecutive frames of a zstd file.

    The library's own stream reader takes a truncated file for a whole one.
    """

    def __init__(self, file: BinaryIO) -> None:
        import zstandard

        self._error = zstandard.ZstdError
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
        self._file = file
        self._frame: Any = None
        self._compressed = b""
        self._content = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._content:
            if not self._read_block():
                return 0
        count = min(len(buffer), len(self._content))
        buffer[:count] = self._content[:count]
        self._content = self._content[count:]
        return count

    def _read_block(self) -> bool:
        """Decompress the next block; False at the end of the file."""
        block = self._compressed or self._file.read(_ZSTD_BLOCK)
        if not block:
            if self._frame is not None:
                raise EOFError("it ends inside a frame")
            return False
        if self._frame is None:
            self._frame = self._decompressor.decompressobj()
        try:
            self._content = memoryview(self._frame.decompress(block))
        except self._error as error:
            raise _DamagedArchive(str(error)) from error
        self._compressed = b""
        if self._frame.eof:
            self._compressed = self._frame.unused_data
            self._frame = None
        return True
