"""Documents, which every corpus yields, and whose text comes in pieces."""

import abc
import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from absl import logging

from simplernn_jax.config import DataConfig
from simplernn_jax.data.source_files import SourceFile, file_status
from simplernn_jax.errors import UserError, counted
from simplernn_jax.files import sha256_hex

PIECE_SIZE = 1 << 20
"""Bytes or characters of text held at a time, so that a document may be larger than memory."""


class Piece(NamedTuple):
    """Part of a text, at most about 1 MiB."""

    text: str
    is_target: bool = True
    """True if its tokens are predicted; the loss leaves others out, such as a user's messages."""


class Entry(NamedTuple):
    """A piece of text and its place in its document."""

    text: str
    is_target: bool
    begins: bool
    """True if it begins the document: BOS precedes it."""
    ends: bool
    """True if it ends the document: EOS follows it."""


class MalformedRecord(Exception):
    """Reason why a record has no text."""


@dataclasses.dataclass(frozen=True)
class Document:
    """One text. A document without text has no pieces."""

    name: str
    """The source, for messages."""
    pieces: Iterator[Piece]
    """The text, cut after a line end where there is one."""


class Corpus(abc.ABC):
    """Documents in a fixed order, read from files; text that cannot be read is a `UserError`.

    Attributes:
      kind: name of the format, part of the fingerprint.
      total_bytes: size of all files on disk, for progress.
      bytes_read: bytes that the running iteration has read of them.
    """

    kind: str

    def __init__(self, files: list[SourceFile], config: DataConfig, **settings: Any) -> None:
        """Measure `files`; the text depends on them and on `settings`, part of the fingerprint."""
        self._files = {file: file_status(file.path).st_size for file in files}
        self._encoding_errors = config.encoding_errors
        self._max_malformed_records = config.max_malformed_records
        self._max_expansion = config.max_expansion
        self._source: Any = config.source
        self._settings = {"kind": self.kind, **settings}
        self.total_bytes = sum(self._files.values())
        self._has_warned = False
        self._begin()

    def _begin(self) -> None:
        """Begin an iteration."""
        self.bytes_read = 0
        self._num_malformed, self._first_problem = 0, ""

    def __getstate__(self) -> dict[str, Any]:
        """Return what `entries` needs, for another process."""
        return {**vars(self), "_files": {}, "_source": ""}

    def items(self) -> Iterator[tuple[Any, int]]:
        """Yield the text in order as `entries` takes it, and its size; fast, since others wait."""
        for document in self.documents():
            for entry in entries_of(document.pieces):
                yield entry, len(entry.text)

    def entries(self, items: Sequence[Any]) -> Iterator[Iterable[Entry] | MalformedRecord]:
        """Yield the text of each item, in another process perhaps, or what is to `skip`."""
        yield from ([item] for item in items)

    def skip(self, problem: str) -> None:
        """Count a malformed record; raises `UserError` if there are more of them than allowed."""
        self._num_malformed += 1
        self._first_problem = self._first_problem or problem
        if self._num_malformed > self._max_malformed_records:
            raise UserError(
                f"{problem}; malformed record {self._num_malformed}, {self._max_malformed_records} "
                "allowed: fix it or raise max_malformed_records (train.py: "
                "--config.data.max_malformed_records)"
            )

    def warn_of_skipped(self) -> None:
        """Warn of the records that were skipped, once."""
        if self._num_malformed and not self._has_warned:
            self._has_warned = True
            skipped = counted(self._num_malformed, "malformed record")
            logging.warning("%s skipped, the first: %s", skipped, self._first_problem)

    def _check_expansion(self, file: SourceFile, num_bytes: int) -> None:
        """Raise `UserError` if a file becomes far more text than it has bytes, and over 1 MiB."""
        if num_bytes > max(PIECE_SIZE, self._max_expansion * self._files[file]):
            raise UserError(
                f"{file.path}: it expands to more than {self._max_expansion:,} times its size; if "
                "you expect that, raise max_expansion (train.py: --config.data.max_expansion)"
            )

    def fingerprint(self) -> str:
        """SHA-256 hex over the settings and the files' present names, sizes and times."""
        status = [(file.name, file_status(file.path)) for file in self._files]
        files = [(name, found.st_size, found.st_mtime_ns) for name, found in status]
        text = json.dumps([self._settings, files], sort_keys=True)
        return sha256_hex(text.encode("utf-8", "surrogateescape"))

    @abc.abstractmethod
    def documents(self) -> Iterator[Document]:
        """Yield all documents. Read the pieces of one before taking the next one."""


def entries_of(pieces: Iterable[Piece]) -> Iterator[Entry]:
    """Yield the pieces of a document with their places in it."""
    previous, begins = None, True
    for piece in pieces:
        if previous is not None:
            yield Entry(*previous, begins, False)
            begins = False
        previous = piece
    if previous is not None:
        yield Entry(*previous, begins, True)


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
    """Encode text as UTF-8; raises `UserError` that names the position of a lone surrogate."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"U+{ord(text[error.start]):04X} at character {error.start} of the text is no "
            "character but half a surrogate pair; remove it or use valid UTF-8"
        ) from error
