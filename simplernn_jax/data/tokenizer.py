"""Text to token ids and back: bytes, characters, or a Hugging Face ``tokenizer.json``.

`InfillingTokenizer` adds to any of them the special ids of filling in the middle.
"""

import json
from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from simplernn_jax.data.documents import Corpus, utf8
from simplernn_jax.errors import UserError, counted

_CODE_POINTS = 0x110000
_SAMPLE_CHARACTERS = 1 << 16
_QUOTED = 12
"""Characters quoted from the first difference on, and before it."""


@runtime_checkable
class Tokenizer(Protocol):
    """Text to ids below `vocab_size` and back. Three ids are special and stand for no text."""

    vocab_size: int
    """Number of ids, the three specials included."""
    bos_id: int
    """First token of a document."""
    eos_id: int
    """Last token of a document."""
    pad_id: int
    """Padding."""
    fim_ids: tuple[int, ...] = ()
    """Ids that mark suffix, prefix and middle in `infilling`, and stand for no text; none if the
    model was not trained to fill in."""

    def encode(self, text: str) -> np.ndarray:
        """Encode `text` as [n] int32 ids, without BOS or EOS.

        Raises:
          UserError: text that has no ids here, such as a lone surrogate.
        """

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Decode `ids`, special and unknown ones left out; invalid UTF-8 becomes U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """Decode to UTF-8 that may end inside a character."""

    def to_json(self) -> str:
        """Serialize for `tokenizer_from_json`."""


def ids_without_text(tokenizer: Tokenizer, vocab_size: int) -> set[int]:
    """Return the ids below `vocab_size`, the model's, that generation must not choose.

    They are BOS, padding, those of infilling and those the tokenizer lacks, but not EOS: some
    vocabularies have one id for several purposes.
    """
    unknown = range(tokenizer.vocab_size, vocab_size)
    special = {tokenizer.bos_id, tokenizer.pad_id, *tokenizer.fim_ids}
    return {*special, *unknown} - {tokenizer.eos_id}


def token_bytes(tokenizer: Tokenizer, vocab_size: int) -> list[bytes]:
    """Return the bytes of the ids below `vocab_size` inside a text, which begins with another one.

    Some decoders change the first token.
    """
    decode, ids = tokenizer.decode_bytes, range(vocab_size)
    context, before = next(((i, text) for i in ids if (text := decode([i]))), (0, b""))
    return [decode([context, i]).removeprefix(before) for i in ids]


class ByteTokenizer(Tokenizer):
    """Id i below 256 is the byte i of the text's UTF-8."""

    vocab_size = 259
    bos_id = 256
    eos_id = 257
    pad_id = 258

    def encode(self, text: str) -> np.ndarray:
        """See `Tokenizer.encode`."""
        return np.frombuffer(utf8(text), np.uint8).astype(np.int32)

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """See `Tokenizer.decode_bytes`."""
        ids = np.asarray(ids, np.int64)
        return ids[(ids >= 0) & (ids < 256)].astype(np.uint8).tobytes()

    def to_json(self) -> str:
        """See `Tokenizer.to_json`."""
        return json.dumps({"kind": "byte"})


class CharTokenizer(Tokenizer):
    """Id i is the i-th character of a fixed alphabet; ValueError if it repeats one."""

    def __init__(self, alphabet: str) -> None:
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
        """See `Tokenizer.encode`; raises `UserError` for a character outside of the alphabet."""
        ids = self._ids[_code_points(text)]
        if ids.size and ids.min() < 0:
            position = int(ids.argmin())
            raise UserError(
                f"{text[position]!r} at character {position} is not among the "
                f"{counted(len(self._alphabet), 'character')} this model knows; remove it, or "
                "train with config.data.tokenizer=byte, which knows all"
            )
        return ids

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """See `Tokenizer.decode_bytes`; never ends inside a character."""
        ids = np.asarray(ids, np.int64)
        known = ids[(ids >= 0) & (ids < len(self._alphabet))]
        return self._characters[known].tobytes().decode("utf-32-le").encode("utf-8")

    def to_json(self) -> str:
        """See `Tokenizer.to_json`."""
        return json.dumps({"kind": "char", "alphabet": self._alphabet})


class InfillingTokenizer(Tokenizer):
    """Another tokenizer, with three more ids after its own.

    Args:
      base: encodes and decodes the text.
    """

    def __init__(self, base: Tokenizer) -> None:
        self.base = base
        self.bos_id, self.eos_id, self.pad_id = base.bos_id, base.eos_id, base.pad_id
        self.vocab_size = base.vocab_size + 3
        self.fim_ids = tuple(range(base.vocab_size, self.vocab_size))

    def encode(self, text: str) -> np.ndarray:
        """See `Tokenizer.encode`; no text has the ids of infilling."""
        return self.base.encode(text)

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """See `Tokenizer.decode_bytes`."""
        ids = np.asarray(ids, np.int64)
        return self.base.decode_bytes(ids[ids < self.base.vocab_size])

    def to_json(self) -> str:
        """See `Tokenizer.to_json`."""
        return json.dumps({"kind": "fim", "base": self.base.to_json()})


def _code_points(text: str) -> np.ndarray:
    try:
        return np.frombuffer(text.encode("utf-32-le"), "<u4")
    except UnicodeEncodeError:
        utf8(text)  # raises, and says where
        raise


def load_tokenizer(spec: str, *corpora: Corpus) -> Tokenizer:
    """Create the tokenizer of a new run.

    Args:
      spec: ``byte``, ``char``, a path to a ``tokenizer.json``, or a name on the Hugging Face hub.
        Not ``bpe:SIZE``, which `prepare_corpus` trains.
      *corpora: read once for the alphabet of ``char``; unused by the others.

    Raises:
      UserError: an unreadable file, a name that is neither cached here nor within reach, or
        ``bpe`` without a size.
    """
    if spec == "byte":
        return ByteTokenizer()
    if spec == "char":
        return CharTokenizer(_alphabet_of(corpora))
    if spec == "bpe":
        raise UserError("tokenizer 'bpe' needs a vocabulary size; use bpe:8192, for example")
    from simplernn_jax.data.pretrained_tokenizer import load_pretrained

    return load_pretrained(spec)


def tokenizer_from_json(text: str) -> Tokenizer:
    """Restore a tokenizer from `Tokenizer.to_json`.

    Raises:
      UserError: corrupted, or of a kind that this version does not know.
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
        if kind == "fim":
            return InfillingTokenizer(tokenizer_from_json(values["base"]))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"the saved tokenizer is corrupted ({error}); restore it from another checkpoint"
        ) from error
    raise UserError(f"the saved tokenizer is of kind {kind!r}; a newer version wrote it: use that")


def _alphabet_of(corpora: Iterable[Corpus]) -> str:
    """Return all characters of corpora, sorted by code point."""
    seen = np.zeros(_CODE_POINTS, np.bool_)
    for corpus in corpora:
        for _, piece in corpus.pieces():
            seen[_code_points(piece.text)] = True
    return np.flatnonzero(seen).astype("<u4").tobytes().decode("utf-32-le")


def check_round_trip(tokenizer: Tokenizer, spec: str, corpus: Corpus, in_parts: bool) -> None:
    """Check that the first 65,536 characters of a corpus survive encoding and decoding.

    A model can neither learn nor generate what its tokenizer loses, and bits per byte would count
    bytes that it never predicts. Only a pretrained tokenizer is tried: bytes and characters are
    lossless. `spec` is its name in the message. Two parts of the text are encoded one by one if
    `in_parts`, as for filling in.

    Raises:
      UserError: names the first difference.
    """
    if isinstance(tokenizer, ByteTokenizer | CharTokenizer):
        return
    left = _SAMPLE_CHARACTERS
    for name, piece in corpus.pieces():
        text = piece.text[:left]
        cut = len(text) // 2 if in_parts else 0
        found = tokenizer.decode([*tokenizer.encode(text[:cut]), *tokenizer.encode(text[cut:])])
        if found != text:
            raise UserError(
                f"tokenizer {spec}: loses text: {_difference(text, found)} in {name}; use one that "
                "gives back what it is given (byte-level, neither lower-casing nor adding a "
                "space), or config.data.tokenizer=byte"
            )
        left -= len(text)
        if not left:
            return


def _difference(text: str, found: str) -> str:
    pairs = enumerate(zip(text, found, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(text), len(found)))
    start = max(0, at - _QUOTED)
    before, after = (one[start : at + _QUOTED] for one in (text, found))
    return f"{before!r} comes back as {after!r} at character {at}"
