"""What every corpus yields: documents, whose text comes in pieces."""

import abc
import dataclasses
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from simplernn_jax.data.source_files import SourceFile, file_status
from simplernn_jax.errors import UserError
from simplernn_jax.files import sha256_hex

PIECE_SIZE = 1 << 20
"""Bytes or characters of text held at a time, so that a document may be larger than memory."""


class Piece(NamedTuple):
    """Part of a text, at most about 1 MiB."""

    text: str
    is_target: bool = True
    """Whether its tokens are predicted; the loss leaves others out, such as a user's messages."""


@dataclasses.dataclass(frozen=True)
class Document:
    """One text. A document without text has no pieces."""

    name: str
    """Its source, for messages."""
    pieces: Iterator[Piece]
    """Its text, cut after a line end where there is one."""


class Corpus(abc.ABC):
    """Documents in a fixed order, read from files.

    Attributes:
      total_bytes: size of all files on disk, for progress.
      bytes_read: bytes that the running iteration has read of them.
    """

    def __init__(self, files: list[SourceFile], encoding_errors: str, **settings: Any) -> None:
        """Measures the files.

        Args:
          files: the files to read.
          encoding_errors: handling of invalid UTF-8, as for `bytes.decode`.
          **settings: values that the text depends on besides the files; part of the fingerprint.

        Raises:
          UserError: a file is gone.
        """
        self._files = files
        self._encoding_errors = encoding_errors
        self._settings = settings
        self.total_bytes = sum(file_status(file.path).st_size for file in files)
        self.bytes_read = 0

    def fingerprint(self) -> str:
        """SHA-256 hex over the settings and the files' present names, sizes and times.

        Raises:
          UserError: a file is gone.
        """
        status = [(file.name, file_status(file.path)) for file in self._files]
        files = [(name, found.st_size, found.st_mtime_ns) for name, found in status]
        text = json.dumps([self._settings, files], sort_keys=True)
        return sha256_hex(text.encode("utf-8", "surrogateescape"))

    @abc.abstractmethod
    def documents(self) -> Iterator[Document]:
        """Yield all documents. Read the pieces of one before taking the next one.

        Raises:
          UserError: text that cannot be read.
        """


def text_pieces(text: str, is_target: bool = True) -> Iterator[Piece]:
    """Cut a text that is in memory into pieces."""
    start = 0
    while start < len(text):
        stop = start + PIECE_SIZE
        if stop < len(text):
            stop = text.rfind("\n", start, stop) + 1 or stop
        yield Piece(text[start:stop], is_target)
        start = stop


def utf8(text: str) -> bytes:
    """Encode text as UTF-8.

    Raises:
      UserError: names the position of a lone surrogate (from a broken argument or escape).
    """
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"U+{ord(text[error.start]):04X} at character {error.start} of the text is no "
            "character but half a surrogate pair; remove it or use valid UTF-8"
        ) from error
