"""Files of a corpus, read one at a time: plain, ``.gz`` and ``.zst``, in UTF-8 or UTF-16."""

import codecs
import contextlib
import dataclasses
import functools
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


class _CorruptArchive(Exception):
    """Reason why a compressed file cannot be read."""


@contextlib.contextmanager
def open_source(path: str, errors: str = "replace") -> Iterator[tuple[IO[bytes], BinaryIO]]:
    """Open a regular file of the user's; the block does nothing with files but read this one.

    Yields the decompressed stream and the file itself. Compressed files are decompressed while they
    are read, a bounded number of bytes at a time. UTF-16, recognized by its byte order mark,
    becomes UTF-8.

    Raises:
      UserError: it cannot be opened or read, is a corrupted or truncated archive, or is invalid
        UTF-16 and `errors` is ``strict``.
    """
    try:
        with open_file(path) as file:
            stream = _decompressed(path, file)
            if stream.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
                blocks = iter(functools.partial(stream.read, 1 << 16), b"")
                texts = codecs.iterdecode(blocks, "utf-16", errors)
                stream = io.BufferedReader(BlockReader(text.encode("utf-8") for text in texts))
            yield stream, file
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: invalid UTF-16 ({error.reason}); convert the file to UTF-8, or run with "
            "encoding_errors=replace (train.py: --config.data.encoding_errors=replace)"
        ) from error
    except (EOFError, zlib.error, gzip.BadGzipFile, _CorruptArchive) as error:
        raise UserError(
            f"{path}: corrupted or truncated ({error}); replace it by an intact copy"
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
        return io.BufferedReader(BlockReader(_zstd_blocks(file)))
    return file


def _zstd_blocks(file: BinaryIO) -> Iterator[bytes]:
    """Decompress the consecutive frames of a zstd file.

    The library's own stream reader takes a truncated file for a whole one.
    """
    import zstandard

    decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
    frame: Any = None
    rest = b""
    while block := rest or file.read(_ZSTD_BLOCK):
        frame = frame or decompressor.decompressobj()
        try:
            yield frame.decompress(block)
        except zstandard.ZstdError as error:
            raise _CorruptArchive(str(error)) from error
        rest = b""
        if frame.eof:
            rest, frame = frame.unused_data, None
    if frame is not None:
        raise EOFError("it ends inside a frame")


class BlockReader(io.RawIOBase):
    """A stream of the bytes of blocks of any size."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks = blocks
        self._content = memoryview(b"")

    def readable(self) -> bool:
        """See `io.RawIOBase`."""
        return True

    def readinto(self, buffer: Any) -> int:
        """See `io.RawIOBase`."""
        while not self._content:
            block = next(self._blocks, None)
            if block is None:
                return 0
            self._content = memoryview(block)
        count = min(len(buffer), len(self._content))
        buffer[:count] = self._content[:count]
        self._content = self._content[count:]
        return count
