"""Byte-level BPE (Sennrich et al., 2016; Radford et al., 2019), trained on the training split."""

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from absl import logging

from simplernn_jax.data.pretrained_tokenizer import GPT2_PATTERN, PretrainedTokenizer
from simplernn_jax.data.token_split import MixedSplit, TokenSplit
from simplernn_jax.errors import UserError

PREFIX = "bpe:"
MIN_VOCAB_SIZE = 256 + 3
MAX_VOCAB_SIZE = 1 << 20
MAX_BYTES = 1 << 28
"""Bytes of the training split that are used, from its beginning; more change few merges, and the
library counts distinct words in memory. Of a mixture, each source has its share of them."""

_LONGEST_WORD = 128
"""Characters of a word, more than in any language: training takes the square of a word's
length. What is longer, such as a line of dashes, is several words."""
_WORDS = GPT2_PATTERN.replace("+", f"{{1,{_LONGEST_WORD}}}")
"""Words of GPT-2, of at most `_LONGEST_WORD` characters."""
_NUM_SPECIALS = 3
_PART_BYTES = 1 << 20


def parse_spec(spec: str) -> int:
    """Return the vocabulary size of ``bpe:SIZE``, specials included; raises `UserError`."""
    is_bpe, digits = spec.startswith(PREFIX), spec.removeprefix(PREFIX)
    is_number = is_bpe and digits.isascii() and digits.isdecimal() and len(digits) <= 8
    if not is_number or not MIN_VOCAB_SIZE <= int(digits) <= MAX_VOCAB_SIZE:
        raise UserError(
            f"--config.data.tokenizer={spec}: give a vocabulary size from {MIN_VOCAB_SIZE} to "
            f"{MAX_VOCAB_SIZE:,}, such as {PREFIX}8192"
        )
    return int(digits)


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
        vocab_size=vocab_size - _NUM_SPECIALS,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    limits = _limits(split)
    num_bytes = sum(min(limit, part.num_bytes) for part, limit in limits)
    logging.info("training a BPE of %s ids on %s bytes", f"{vocab_size:,}", f"{num_bytes:,}")
    texts = itertools.chain.from_iterable(itertools.starmap(_texts, limits))
    with ThreadPoolExecutor(1) as thread:  # so that this one handles signals meanwhile
        thread.submit(tokenizer.train_from_iterator, texts, trainer).result()
    json: str = tokenizer.to_str()
    found = PretrainedTokenizer(json).vocab_size
    if found < vocab_size:
        logging.warning("this text gives only %s of %s ids", f"{found:,}", f"{vocab_size:,}")
    return json


def _limits(split: TokenSplit) -> list[tuple[TokenSplit, int]]:
    """Return each source of a split with the maximum number of its bytes that are used."""
    if isinstance(split, MixedSplit):
        pairs = zip(split.parts, split.weights, strict=True)
        return [(part, int(MAX_BYTES * weight)) for part, weight in pairs]
    return [(split, MAX_BYTES)]


def _texts(split: TokenSplit, limit: int) -> Iterator[str]:
    """Yield the text of each document, up to a number of bytes, in parts of bounded size."""
    count = int(np.searchsorted(split.document_starts, limit))
    bounds = np.append(split.document_starts[: count + 1], len(split.tokens))[: count + 1]
    for start, end in itertools.pairwise(map(int, bounds)):
        for at in range(start, min(end, limit), _PART_BYTES):
            ids = np.asarray(split.tokens[at : min(at + _PART_BYTES, end)])
            # A part may begin or end inside a character.
            yield ids[ids < 256].astype(np.uint8).tobytes().decode("utf-8", "ignore")
