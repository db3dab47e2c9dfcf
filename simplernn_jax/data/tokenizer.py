"""Text to token ids and back: bytes, characters, or a Hugging Face ``tokenizer.json``."""

import json
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from simplernn_jax.data.documents import Corpus, utf8
from simplernn_jax.errors import UserError, counted

_CODE_POINTS = 0x110000


class Tokenizer(Protocol):
    """Text to ids below `vocab_size` and back. Three of the ids stand for no text."""

    @property
    def vocab_size(self) -> int:
        """Number of ids, the three specials included."""

    @property
    def bos_id(self) -> int:
        """Opens a document."""

    @property
    def eos_id(self) -> int:
        """Closes a document."""

    @property
    def pad_id(self) -> int:
        """Fills the rest of a row."""

    def encode(self, text: str) -> np.ndarray:
        """The [n] int32 ids of `text`, without BOS or EOS.

        Raises:
          UserError: text that has no ids here, such as a lone surrogate.
        """

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of `ids`, without ids that stand for none; invalid UTF-8 becomes U+FFFD."""

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """Like `decode`, as UTF-8 that may end inside a character."""

    def to_json(self) -> str:
        """Everything `tokenizer_from_json` needs."""


def load_tokenizer(spec: str, corpus: Corpus | None) -> Tokenizer:
    """Makes the tokenizer of a new run.

    Args:
      spec: ``byte``, ``char``, a path to a ``tokenizer.json``, or a name on the Hugging Face hub.
      corpus: read once for the alphabet of ``char``; unused by the others.

    Raises:
      UserError: an unreadable file, or a name that is neither cached here nor within reach.
    """
    if spec == "byte":
        return ByteTokenizer()
    if spec == "char":
        if corpus is None:
            raise UserError("tokenizer 'char' takes its alphabet from a corpus; none was given")
        return CharTokenizer(_alphabet(corpus))
    from simplernn_jax.data.pretrained_tokenizer import load_pretrained

    return load_pretrained(spec)


def tokenizer_from_json(text: str) -> Tokenizer:
    """Rebuilds what `Tokenizer.to_json` wrote.

    Raises:
      UserError: not such a text.
    """
    try:
        values = json.loads(text)
        kind = values["kind"]
        if kind == "byte":
            return ByteTokenizer()
        if kind == "char":
            return CharTokenizer(values["alphabet"])
        if kind == "pretrained":
            from simplernn_jax.data.pretrained_tokenizer import PretrainedTokenizer

            return PretrainedTokenizer(values["tokenizer"], **values["special_ids"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"the saved tokenizer is damaged ({error}); restore it from another checkpoint"
        ) from error
    raise UserError(f"the saved tokenizer is of kind {kind!r}; a newer version wrote it: use that")


class ByteTokenizer:
    """Id i below 256 is the byte i of the text's UTF-8."""

    vocab_size = 259
    bos_id = 256
    eos_id = 257
    pad_id = 258

    def encode(self, text: str) -> np.ndarray:
        """See `Tokenizer.encode`."""
        return np.frombuffer(utf8(text), np.uint8).astype(np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """See `Tokenizer.decode`."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """See `Tokenizer.decode_bytes`."""
        ids = np.asarray(ids, np.int64)
        return ids[(ids >= 0) & (ids < 256)].astype(np.uint8).tobytes()

    def to_json(self) -> str:
        """See `Tokenizer.to_json`."""
        return json.dumps({"kind": "byte"})


class CharTokenizer:
    """Id i is the i-th character of a fixed alphabet."""

    def __init__(self, alphabet: str) -> None:
        """Builds it.

        Raises:
          ValueError: `alphabet` is no text, or repeats a character.
        """
        if not isinstance(alphabet, str) or len(set(alphabet)) != len(alphabet):
            raise ValueError("an alphabet is text that has each character once")
        self._alphabet = alphabet
        self._characters = _code_points(alphabet)
        self._ids = np.full(_CODE_POINTS, -1, np.int32)
        self._ids[self._characters] = np.arange(len(alphabet))
        self.bos_id = len(alphabet)
        self.eos_id = self.bos_id + 1
        self.pad_id = self.bos_id + 2
        self.vocab_size = self.bos_id + 3

    def encode(self, text: str) -> np.ndarray:
        """See `Tokenizer.encode`.

        Raises:
          UserError: a character that is not in the alphabet.
        """
        ids = self._ids[_code_points(text)]
        if ids.size and ids.min() < 0:
            position = int(ids.argmin())
            raise UserError(
                f"{text[position]!r} at character {position} is not among the "
                f"{counted(len(self._alphabet), 'character')} this model knows; remove it, or "
                "train with --config.data.tokenizer=byte, which knows all"
            )
        return ids

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """See `Tokenizer.decode`."""
        ids = np.asarray(ids, np.int64)
        known = ids[(ids >= 0) & (ids < len(self._alphabet))]
        return self._characters[known].tobytes().decode("utf-32-le")

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """See `Tokenizer.decode_bytes`; never ends inside a character."""
        return self.decode(ids).encode("utf-8")

    def to_json(self) -> str:
        """See `Tokenizer.to_json`."""
        return json.dumps({"kind": "char", "alphabet": self._alphabet})


def _code_points(text: str) -> np.ndarray:
    try:
        return np.frombuffer(text.encode("utf-32-le"), "<u4")
    except UnicodeEncodeError:
        utf8(text)  # raises, and says where
        raise


def _alphabet(corpus: Corpus) -> str:
    """All characters of a corpus, sorted by code point."""
    seen = np.zeros(_CODE_POINTS, np.bool_)
    for document in corpus.documents():
        for piece in document.pieces:
            seen[_code_points(piece)] = True
    return np.flatnonzero(seen).astype("<u4").tobytes().decode("utf-32-le")
