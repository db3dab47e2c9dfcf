"""What every corpus gives: documents, whose text comes in pieces."""

import dataclasses
from collections.abc import Iterator
from typing import Protocol

from simplernn_jax.errors import UserError

PIECE_SIZE = 1 << 20
"""Bytes or characters of text held at a time, so that a document may be larger than memory."""


@dataclasses.dataclass(frozen=True)
class Document:
    """One text. A document without text has no pieces."""

    name: str
    """Where it comes from, for messages."""
    pieces: Iterator[str]
    """Its text, at most about 1 MiB at a time, cut after a line end where there is one."""


class Corpus(Protocol):
    """Documents in a fixed order."""

    @property
    def total_bytes(self) -> int:
        """Size of the source, for progress."""

    @property
    def bytes_read(self) -> int:
        """How much of it the running iteration has read."""

    def fingerprint(self) -> str:
        """SHA-256 hex over the names, sizes and modification times of this moment."""

    def documents(self) -> Iterator[Document]:
        """All documents. The pieces of one are to be read before the next one is taken.

        Raises:
          UserError: text that cannot be read.
        """


def text_pieces(text: str) -> Iterator[str]:
    """Cuts a text that is in memory into pieces."""
    start = 0
    while start < len(text):
        stop = start + PIECE_SIZE
        if stop < len(text):
            stop = text.rfind("\n", start, stop) + 1 or stop
        yield text[start:stop]
        start = stop


def utf8(text: str) -> bytes:
    """Encodes text, or says where it holds half a surrogate pair (a broken argument or escape).

    Raises:
      UserError: with the character's position.
    """
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"U+{ord(text[error.start]):04X} at character {error.start} of the text is no "
            "character but half a surrogate pair; remove it or give valid UTF-8"
        ) from error
