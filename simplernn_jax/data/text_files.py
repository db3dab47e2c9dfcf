"""Text files as a corpus: each file is a document, read piece by piece."""

import codecs
import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator
from typing import BinaryIO

from simplernn_jax.data.documents import PIECE_SIZE, Document
from simplernn_jax.errors import UserError
from simplernn_jax.files import open_file


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """A file of a corpus."""

    name: str
    """Its path below the folder or glob it was found by; part of the fingerprint."""
    path: str


@contextlib.contextmanager
def open_source(path: str) -> Iterator[BinaryIO]:
    """Opens a regular file of the user's; the block does nothing with files but read this one.

    Raises:
      UserError: it cannot be opened or read.
    """
    try:
        with open_file(path) as stream:
            yield stream
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; make it readable or leave it out") from error


def files_fingerprint(files: list[SourceFile], **settings: object) -> str:
    """SHA-256 hex over names, sizes, modification times and what else the reading depends on.

    Raises:
      UserError: a file is gone.
    """
    rows = []
    for file in files:
        try:
            status = os.stat(file.path)
        except OSError as error:
            raise UserError(f"{file.path}: {error.strerror}; put it back and run again") from error
        rows.append((file.name, status.st_size, status.st_mtime_ns))
    text = json.dumps([settings, rows], sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


class TextFiles:
    """A corpus of UTF-8 text files, each of them one document."""

    def __init__(self, files: list[SourceFile], encoding_errors: str) -> None:
        self._files = files
        self._encoding_errors = encoding_errors
        self.total_bytes = sum(os.path.getsize(file.path) for file in files)
        self.bytes_read = 0

    def fingerprint(self) -> str:
        """See `Corpus.fingerprint`."""
        return files_fingerprint(self._files, kind="text")

    def documents(self) -> Iterator[Document]:
        """See `Corpus.documents`."""
        self.bytes_read = 0
        for file in self._files:
            yield Document(file.name, self._pieces(file))

    def _pieces(self, file: SourceFile) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")(self._encoding_errors)
        offset = 0
        rest = ""
        with open_source(file.path) as stream:
            last = False
            while not last:
                block = stream.read(PIECE_SIZE)
                last = len(block) < PIECE_SIZE
                pending = len(decoder.getstate()[0])
                try:
                    text = decoder.decode(block, final=last)
                except UnicodeDecodeError as error:
                    raise UserError(
                        f"{file.path}: invalid UTF-8 at byte {offset - pending + error.start}; "
                        "convert the file to UTF-8, or run with encoding_errors=replace "
                        "(train.py: --config.data.encoding_errors=replace)"
                    ) from error
                if offset == 0:
                    text = text.removeprefix("\ufeff")  # a byte order mark is no text
                offset += len(block)
                self.bytes_read += len(block)
                text = rest + text
                stop = len(text) if last else text.rfind("\n") + 1 or len(text)
                if stop:
                    yield text[:stop]
                rest = text[stop:]
