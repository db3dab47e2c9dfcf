"""Corpora: documents in a fixed order, whose text comes in pieces."""

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import IO, Any, NamedTuple

from absl import logging

from simplernn_jax.config import DataConfig
from simplernn_jax.data.source_files import SourceFile, open_source
from simplernn_jax.errors import UserError, counted, one_line
from simplernn_jax.files import sha256_hex

PIECE_SIZE = 1 << 20
"""Bytes or characters of text held at a time, so that a document may be larger than memory."""


class Piece(NamedTuple):
    """Part of the text of a document, at most about 1 MiB."""

    text: str
    is_target: bool
    """True if its tokens are predicted; the loss leaves others out, such as a user's messages."""
    begins: bool
    """True if it begins the document: BOS precedes it."""
    ends: bool
    """True if it ends the document: EOS follows it."""


class MalformedRecord(Exception):
    """Reason why a record has no text."""


Record = tuple[SourceFile, str, Any]
"""A file, the place of a record in it, for messages, and its content, not parsed."""


class Corpus:
    """Documents in a fixed order, read from files; text that cannot be read is a `UserError`.

    Attributes:
      kind: name of the format, part of the fingerprint.
      total_bytes: size of all files on disk, for progress.
      bytes_read: bytes that the running iteration has read of them.
    """

    kind: str

    def __init__(self, files: Sequence[SourceFile], config: DataConfig, **settings: Any) -> None:
        """Measure `files`; the text depends on them and on `settings`, part of the fingerprint."""
        self._files = {file: os.path.getsize(file.path) for file in files}
        self._config = config
        self._settings = {"kind": self.kind, **settings}
        self.total_bytes = sum(self._files.values())
        self._has_warned = False
        self._begin()

    def _begin(self) -> None:
        """Begin an iteration."""
        self.bytes_read = self._bytes_before = 0  # in all, and of the files before the present one
        self._num_malformed, self._first_problem = 0, ""

    def __getstate__(self) -> dict[str, Any]:
        """Return what `parse` needs, for another process."""
        return vars(self) | {"_files": {}, "_config": dataclasses.replace(self._config, source="")}

    def records(self) -> Iterator[tuple[Record, int]]:
        """Yield all records in order, and their sizes; fast, since the processes of `parse` wait.

        A record is a document, or a piece of one that may be larger than memory.
        """
        self._begin()
        for file, num_bytes in self._files.items():
            for place, content, size in self._read(file):
                yield (file, place, content), size
            self._bytes_before += num_bytes
            self.bytes_read = self._bytes_before

    def parse(self, records: Sequence[Record]) -> Iterator[Iterable[Piece] | MalformedRecord]:
        """Yield the pieces of each record, in another process perhaps, or what is to `skip`."""
        parsed = self._parse([content for _, _, content in records])
        for (file, place, _), found in zip(records, parsed, strict=True):
            if isinstance(found, MalformedRecord):
                found = MalformedRecord(one_line(f"{file.path}{place}: {found}"))
            yield found

    def pieces(self) -> Iterator[tuple[str, Piece]]:
        """Yield the pieces of all documents, each with the name of its document for messages."""
        for record, _ in self.records():
            for found in self.parse([record]):
                if isinstance(found, MalformedRecord):
                    self.skip(str(found))
                else:
                    file, place, _ = record
                    yield from ((f"{file.name}{place}", piece) for piece in found)
        self.warn_of_skipped()

    def skip(self, problem: str) -> None:
        """Count a malformed record; raises `UserError` if there are more of them than allowed."""
        self._num_malformed += 1
        self._first_problem = self._first_problem or problem
        allowed = self._config.max_malformed_records
        if self._num_malformed > allowed:
            raise UserError(
                f"{problem}; malformed record {self._num_malformed}, {allowed} allowed: fix it or "
                "raise config.data.max_malformed_records"
            )

    def warn_of_skipped(self) -> None:
        """Warn of the records that were skipped, once."""
        if self._num_malformed and not self._has_warned:
            self._has_warned = True
            skipped = counted(self._num_malformed, "malformed record")
            logging.warning("%s skipped, the first: %s", skipped, self._first_problem)

    def fingerprint(self) -> str:
        """SHA-256 hex over the settings and the files' present names, sizes and times."""
        try:
            status = [(file.name, os.stat(file.path)) for file in self._files]
        except OSError as error:
            problem = f"{error.filename}: {error.strerror}"
            raise UserError(f"{problem}; put it back and run again") from error
        files = [(name, found.st_size, found.st_mtime_ns) for name, found in status]
        text = json.dumps([self._settings, files], sort_keys=True)
        return sha256_hex(text.encode("utf-8", "surrogateescape"))

    def _read(self, file: SourceFile) -> Iterator[tuple[str, Any, int]]:
        """Yield the places and contents of the records of a file, and their sizes."""
        raise NotImplementedError

    def _parse(self, contents: Sequence[Any]) -> Iterator[Iterable[Piece] | MalformedRecord]:
        for content in contents:
            try:
                yield self._pieces(content)
            except MalformedRecord as error:
                yield error

    def _pieces(self, content: Any) -> Iterable[Piece]:
        """Return the text of a record; raises `MalformedRecord`."""
        raise NotImplementedError

    def _opened(self, file: SourceFile) -> AbstractContextManager[IO[bytes]]:
        """Open a file, decompressed; count what is read of it, and check its expansion."""

        def on_read(position: int, num_bytes: int) -> None:
            self.bytes_read = self._bytes_before + position
            self._check_expansion(file, num_bytes)

        return open_source(file.path, self._config.encoding_errors, on_read)

    def _check_expansion(self, file: SourceFile, num_bytes: int) -> None:
        """Raise `UserError` if a file becomes far more text than it has bytes, and over 1 MiB."""
        most = self._config.max_expansion
        if num_bytes > max(PIECE_SIZE, most * self._files[file]):
            raise UserError(
                f"{file.path}: it expands to more than {most:,} times its size; if you expect "
                "that, raise config.data.max_expansion"
            )


def pieces_of(texts: Iterable[tuple[str, bool]]) -> Iterator[Piece]:
    """Yield the pieces of a document, given as texts and whether they are targets."""
    previous, begins = None, True
    for text in texts:
        if previous is not None:
            yield Piece(*previous, begins, False)
            begins = False
        previous = text
    if previous is not None:
        yield Piece(*previous, begins, True)


def cut_text(text: str, is_target: bool = True) -> Iterator[tuple[str, bool]]:
    """Cut a text that is in memory for `pieces_of`."""
    start = 0
    while start < len(text):
        stop = start + PIECE_SIZE
        if stop < len(text):
            stop = text.rfind("\n", start, stop) + 1 or stop
        yield text[start:stop], is_target
        start = stop


def utf8(text: str) -> bytes:
    """Encode text as UTF-8; raises `UserError` that names the position of a lone surrogate."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"U+{ord(text[error.start]):04X} at character {error.start} of the text is not "
            "a character but half a surrogate pair; remove it or use valid UTF-8"
        ) from error
