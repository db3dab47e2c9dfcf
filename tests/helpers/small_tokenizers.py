"""Tokenizers of a few tokens, shared by tests."""

import json

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from simplernn_jax.data import TokenSplit, tokenizer_from_json
from simplernn_jax.data.pretrained_tokenizer import train_bpe


def pretrained(tokenizer):
    """The project's tokenizer of a library's one, or of its JSON."""
    text = tokenizer if isinstance(tokenizer, str) else tokenizer.to_str()
    saved = {"kind": "pretrained", "tokenizer": text, "special_ids": {}}
    return tokenizer_from_json(json.dumps(saved))


def byte_level(normalizer=None, *, add_prefix_space=False):
    """A tokenizer of single bytes."""
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def bpe_of(text, vocab_size=300):
    """The tokenizer that `bpe:SIZE` trains on one document."""
    ids = np.frombuffer(text.encode(), np.uint8)
    return pretrained(
        train_bpe(TokenSplit("train", ids, np.zeros(1, int), len(ids), ""), vocab_size)
    )


def word_level(*words, unknown="[UNK]"):
    """A tokenizer of words, which loses all others and white space."""
    vocabulary = {word: number for number, word in enumerate(("[UNK]", *words))}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def char_tokenizer(alphabet: str):
    return tokenizer_from_json(json.dumps({"kind": "char", "alphabet": alphabet}))
