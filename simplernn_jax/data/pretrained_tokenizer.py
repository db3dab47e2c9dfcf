"""A Hugging Face ``tokenizer.json``: from a file, from the hub, or trained.

A trained one is a byte-level BPE (Sennrich et al., 2016; Radford et al., 2019).
"""

import contextlib
import itertools
import json
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from absl import logging

from simplernn_jax.data.documents import utf8
from simplernn_jax.data.token_split import TokenSplit
from simplernn_jax.data.tokenizer import Tokenizer
from simplernn_jax.errors import UserError, library_errors
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
BPE_PREFIX = "bpe:"
_MIN_BPE_SIZE, _MAX_BPE_SIZE = 256 + 3, 1 << 20
MAX_TRAINING_BYTES = 1 << 28
"""Bytes of the training split that are used, from its beginning; more change few merges, and the
library counts distinct words in memory. Of a mixture, each source has its share of them."""

_LONGEST_WORD = 128
"""Characters of a word, more than in any language: training takes the square of a word's
length. What is longer, such as a line of dashes, is several words."""
_WORDS = GPT2_PATTERN.replace("+", f"{{1,{_LONGEST_WORD}}}")
"""Words of GPT-2, of at most `_LONGEST_WORD` characters."""
_PART_BYTES = 1 << 20


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
        raise UserError(f"tokenizer {path}: {problem}; pass a tokenizer.json") from error


def _from_hub(name: str) -> str:
    from huggingface_hub import hf_hub_download

    # Without a network, the hub's client retries before it looks into its cache.
    with contextlib.suppress(Exception):
        return hf_hub_download(name, "tokenizer.json", local_files_only=True)
    try:
        return hf_hub_download(name, "tokenizer.json")
    except Exception as error:  # of whichever HTTP library the client uses
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

        with library_errors("the tokenizer cannot be loaded", "use another"):
            parsed = json.loads(tokenizer_json)
            _check_merges(parsed["model"])
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
        self._byte_level = _is_byte_level(parsed.get("decoder"))
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
        with library_errors("the tokenizer cannot encode this text", "use another"):
            (encoding,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)
            ids = np.array(encoding.ids, np.int64)
            if (largest := int(np.max(ids, initial=0))) >= self._vocabulary_end:
                raise ValueError(f"id {largest:,} is beyond its vocabulary")
        return ids.astype(np.int32)

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """See `Tokenizer.decode_bytes`."""
        numbers = np.asarray(ids, np.int64).tolist()
        if self._byte_level:
            return b"".join(self._bytes_of_id.get(number, b"") for number in numbers)
        specials, end = (self.bos_id, self.eos_id, self.pad_id), self._vocabulary_end
        kept = [number for number in numbers if 0 <= number < end and number not in specials]
        # Byte tokens at the end may be an unfinished character, which the library would replace;
        # as bytes they can be completed later.
        stop = len(kept)
        while stop and kept[stop - 1] in self._bytes_of_id:
            stop -= 1
        with library_errors("the tokenizer cannot decode these ids", "use another"):
            text = self._tokenizer.decode(kept[:stop], skip_special_tokens=True)
        return text.encode("utf-8") + b"".join(self._bytes_of_id[number] for number in kept[stop:])

    def to_json(self) -> str:
        """See `Tokenizer.to_json`."""
        special_ids = {"bos_id": self.bos_id, "eos_id": self.eos_id, "pad_id": self.pad_id}
        return json.dumps(
            {"kind": "pretrained", "tokenizer": self.tokenizer_json, "special_ids": special_ids}
        )


def _check_merges(model: dict[str, Any]) -> None:
    """Reject merges that lack the prefix of their second token: the library cuts it off unchecked.

    It then ends the process in the middle of a character (tokenizers 0.23).
    """
    prefix = model.get("continuing_subword_prefix") or ""
    for merge in model.get("merges", ()) if prefix else ():
        second = merge.split(" ")[-1] if isinstance(merge, str) else merge[-1]
        if not second.startswith(prefix):
            raise ValueError(f"the merge {merge!r} lacks its continuing_subword_prefix {prefix!r}")


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


def bpe_size(spec: str) -> int:
    """Return the vocabulary size of ``bpe:SIZE``, specials included; raises `UserError`."""
    digits = re.fullmatch(BPE_PREFIX + "([0-9]{1,8})", spec)
    if not digits or not _MIN_BPE_SIZE <= int(digits[1]) <= _MAX_BPE_SIZE:
        raise UserError(
            f"--config.data.tokenizer={spec}: give a vocabulary size from {_MIN_BPE_SIZE} to "
            f"{_MAX_BPE_SIZE:,}, such as {BPE_PREFIX}8192"
        )
    return int(digits[1])


def train_bpe(split: TokenSplit, vocab_size: int) -> str:
    """Train a byte-level BPE; equal arguments give equal tokenizers.

    Args:
      split: of byte tokens; of a mixture, each source counts by its weight if it is long.
      vocab_size: ids, BOS, EOS and PAD included; fewer if the text has no more pairs.

    Returns:
      A ``tokenizer.json`` in Hugging Face's form.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    words = pre_tokenizers.Split(tokenizers.Regex(_WORDS), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, as_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 3,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    weighted = zip(split.parts, split.weights, strict=True) if split.parts else [(split, 1.0)]
    limits = [(part, int(MAX_TRAINING_BYTES * weight)) for part, weight in weighted]
    num_bytes = sum(min(limit, part.num_bytes) for part, limit in limits)
    logging.info("training a BPE of %s ids on %s bytes", f"{vocab_size:,}", f"{num_bytes:,}")
    texts = itertools.chain.from_iterable(itertools.starmap(training_texts, limits))
    with ThreadPoolExecutor(1) as thread:  # so that this one handles signals meanwhile
        thread.submit(tokenizer.train_from_iterator, texts, trainer).result()
    json: str = tokenizer.to_str()
    found = PretrainedTokenizer(json).vocab_size
    if found < vocab_size:
        logging.warning("this text gives only %s of %s ids", f"{found:,}", f"{vocab_size:,}")
    return json


def training_texts(split: TokenSplit, limit: int) -> Iterator[str]:
    """Yield the text of each document, up to a number of bytes, in parts of bounded size."""
    count = int(np.searchsorted(split.document_starts, limit))
    bounds = np.append(split.document_starts[: count + 1], len(split.tokens))[: count + 1]
    for start, end in itertools.pairwise(map(int, bounds)):
        for at in range(start, min(end, limit), _PART_BYTES):
            ids = np.asarray(split.tokens[at : min(at + _PART_BYTES, end)])
            # A part may begin or end inside a character.
            yield ids[ids < 256].astype(np.uint8).tobytes().decode("utf-8", "ignore")
