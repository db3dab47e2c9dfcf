"""A Hugging Face ``tokenizer.json``, from a file or from the hub."""

import contextlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from simplernn_jax.data.documents import utf8
from simplernn_jax.data.tokenizer import Tokenizer
from simplernn_jax.errors import UserError
from simplernn_jax.files import read_file

_BOS_NAMES = ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "<|im_start|>", "[CLS]")
_EOS_NAMES = ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>", "<|im_end|>", "[SEP]")
_PAD_NAMES = ("<pad>", "<|pad|>", "<|finetune_right_pad_id|>", "[PAD]")
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""Words of a ByteLevel pre-tokenizer (GPT-2)."""
MAX_TOKENIZER_BYTES = 1 << 28
"""Maximum number of bytes of a ``tokenizer.json``. One of a million ids has about 90 MB."""
_MAX_IDS = 1 << 24
"""Maximum number of ids of a vocabulary. The largest known ones have a million; an id of four
billion is corruption, which only the memory of its embedding would reveal."""


def load_pretrained(spec: str) -> "PretrainedTokenizer":
    """Load a ``tokenizer.json`` from a path, the local hub cache, or the hub, in this order.

    Raises:
      UserError: unreadable, or neither found here nor on the hub.
    """
    path = spec if "\0" in spec else os.path.expanduser(spec)
    is_path = os.path.lexists(path) or spec.endswith(".json") or spec.startswith((".", "/", "~"))
    if not is_path:
        path = _from_hub(spec)
    try:
        return PretrainedTokenizer(read_file(path, MAX_TOKENIZER_BYTES).decode("utf-8"))
    except (OSError, ValueError, UserError) as error:
        problem = getattr(error, "strerror", None) or error
        raise UserError(f"tokenizer {path}: {problem}; pass that of a tokenizer.json") from error


def _from_hub(name: str) -> str:
    from huggingface_hub import hf_hub_download

    # Without a network, the hub's client retries before it looks into its cache.
    with contextlib.suppress(Exception):
        return hf_hub_download(name, "tokenizer.json", local_files_only=True)
    try:
        return hf_hub_download(name, "tokenizer.json")
    except Exception as error:  # those of whichever HTTP library the client uses
        raise UserError(
            f"tokenizer {name!r}: neither a file nor cached here, and the hub did not give it "
            f"({error}); use byte, char, bpe:SIZE, the path of a tokenizer.json, or a hub name on "
            "a machine with a network"
        ) from error


class PretrainedTokenizer(Tokenizer):
    """A ``tokenizer.json`` with BOS, EOS and PAD.

    They are looked up by their usual names; those not found get ids after the vocabulary. Their
    names in a text are encoded as plain text, so that no text can end a document.
    """

    def __init__(
        self,
        tokenizer_json: str,
        bos_id: int | None = None,
        eos_id: int | None = None,
        pad_id: int | None = None,
    ) -> None:
        """Parse the text of the file; ids that are given were chosen by an earlier run.

        Raises:
          UserError, ValueError: the text is not of this format.
        """
        import tokenizers

        with _library_errors("be loaded"):
            self._tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self.tokenizer_json = tokenizer_json
        vocabulary: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        self._vocabulary_end = max(vocabulary.values(), default=-1) + 1
        if self._vocabulary_end > _MAX_IDS:
            raise ValueError(f"ids up to {self._vocabulary_end - 1:,}; {_MAX_IDS:,} are possible")
        self.vocab_size = self._vocabulary_end
        self.bos_id = self._special(bos_id, _BOS_NAMES, vocabulary)
        self.eos_id = self._special(eos_id, _EOS_NAMES, vocabulary)
        self.pad_id = self._special(pad_id, _PAD_NAMES, vocabulary)
        self._byte_level = _is_byte_level(json.loads(tokenizer_json).get("decoder"))
        self._bytes_of_id = self._bytes_table(vocabulary)

    def _special(
        self, chosen: int | None, names: tuple[str, ...], vocabulary: dict[str, int]
    ) -> int:
        found = [vocabulary[name] for name in names if name in vocabulary]
        if chosen is None:
            chosen = found[0] if found else self.vocab_size
        if type(chosen) is not int or not 0 <= chosen < _MAX_IDS + 3:
            raise ValueError(f"a special id {chosen!r}")
        self.vocab_size = max(self.vocab_size, chosen + 1)
        return chosen

    def _bytes_table(self, vocabulary: dict[str, int]) -> dict[int, bytes]:
        """Map ids to bytes: all of a byte-level vocabulary, the byte tokens of another one."""
        if not self._byte_level:
            matches = {number: _BYTE_TOKEN.fullmatch(token) for token, number in vocabulary.items()}
            return {
                number: bytes([int(match[1], 16)]) for number, match in matches.items() if match
            }
        added = self._tokenizer.get_added_tokens_decoder()
        special = {number for number, token in added.items() if token.special}
        special |= {self.bos_id, self.eos_id, self.pad_id}
        byte_of = byte_level_alphabet()
        return {
            number: bytes(byte_of[c] for c in token)
            if all(c in byte_of for c in token)
            else token.encode("utf-8")
            for token, number in vocabulary.items()
            if number not in special
        }

    def encode(self, text: str) -> np.ndarray:
        """See `Tokenizer.encode`; raises `UserError` also for a part without a token."""
        utf8(text)
        with _library_errors("encode this text"):
            (encoding,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)
            ids = np.array(encoding.ids, np.int64)
            if (largest := int(np.max(ids, initial=0))) >= self._vocabulary_end:
                raise ValueError(f"id {largest:,} is beyond its vocabulary")
        return ids.astype(np.int32)

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """See `Tokenizer.decode_bytes`."""
        specials = (self.bos_id, self.eos_id, self.pad_id)
        kept = [
            number
            for number in np.asarray(ids, np.int64).tolist()
            if 0 <= number < self._vocabulary_end and number not in specials
        ]
        if self._byte_level:
            return b"".join(self._bytes_of_id.get(number, b"") for number in kept)
        # Byte tokens at the end may be an unfinished character, which the library would replace;
        # as bytes they can be completed later.
        stop = len(kept)
        while stop and kept[stop - 1] in self._bytes_of_id:
            stop -= 1
        with _library_errors("decode these ids"):
            text = self._tokenizer.decode(kept[:stop], skip_special_tokens=True)
        return text.encode("utf-8") + b"".join(self._bytes_of_id[number] for number in kept[stop:])

    def to_json(self) -> str:
        """See `Tokenizer.to_json`."""
        special_ids = {"bos_id": self.bos_id, "eos_id": self.eos_id, "pad_id": self.pad_id}
        return json.dumps(
            {"kind": "pretrained", "tokenizer": self.tokenizer_json, "special_ids": special_ids}
        )


@contextlib.contextmanager
def _library_errors(action: str) -> Iterator[None]:
    """Turn exceptions of the library, and panics of Rust, into a `UserError`."""
    try:
        yield
    except BaseException as error:
        # PanicException is not an Exception and cannot be imported.
        if not isinstance(error, Exception) and type(error).__module__ != "pyo3_runtime":
            raise
        problem = f"{type(error).__name__}: {error}"
        raise UserError(f"the tokenizer cannot {action} ({problem}); use another") from error


def _is_byte_level(decoder: Any) -> bool:
    if not isinstance(decoder, dict):
        return False
    if decoder.get("type") == "Sequence":
        return any(_is_byte_level(part) for part in decoder["decoders"])
    return decoder.get("type") == "ByteLevel"


def byte_level_alphabet() -> dict[str, int]:
    """Map each character of a byte-level vocabulary to its byte.

    Printable Latin-1 bytes stand for themselves; the others, in order, for U+0100 and up (the
    convention of GPT-2's vocabulary).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    pairs = {chr(byte): byte for byte in printable}
    return pairs | {chr(0x100 + i): byte for i, byte in enumerate(others)}
