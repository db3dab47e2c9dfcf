"""Small corpora, tokenizers and token splits, shared by tests."""

import collections
import dataclasses
import json

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from simplernn_jax.config import DataConfig
from simplernn_jax.data import TokenSplit, open_corpus, tokenizer_from_json
from simplernn_jax.data.pretrained_tokenizer import train_bpe

BOS, EOS, PAD = 200, 201, 202
TEXT_LENGTHS = (31, 0, 7, 13, 1, 101, 12, 43, 14, 3)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def records(*values):
    """JSONL of these values."""
    return "".join(json.dumps(value) + "\n" for value in values)


def read_all(source, **settings):
    """Texts of all documents with text, by name."""
    corpus = open_corpus(DataConfig(source=str(source), **settings))
    pieces = collections.defaultdict(list)
    for name, piece in corpus.pieces():
        pieces[name].append(piece)
    assert corpus.bytes_read == corpus.total_bytes
    for found in pieces.values():
        ends = [(piece.begins, piece.ends) for piece in found]
        assert ends == [(n == 0, n == len(found) - 1) for n in range(len(found))]
    return {name: "".join(piece.text for piece in found) for name, found in pieces.items()}


def talk(*pairs, system=None):
    """A conversation of questions and answers."""
    found = [] if system is None else [{"role": "system", "content": system}]
    for question, answer in pairs:
        found.append({"role": "user", "content": question})
        if answer is not None:
            found.append({"role": "assistant", "content": answer})
    return found


def stores(cache):
    """All that is in a cache folder, except locks and records."""
    return [path for path in cache.iterdir() if path.suffix not in (".lock", ".json")]


def contents(cache):
    """Files of the one store in a cache folder, by name."""
    (store,) = stores(cache)
    return {path.name: path.read_bytes() for path in store.iterdir()}


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


def make_split(text_lengths=TEXT_LENGTHS, *, dtype=np.uint8, cut_front=0, cut_back=0):
    """Documents of random ids below 200; cuts leave part of the first or last one."""
    random = np.random.default_rng(5)
    documents = [[BOS, *random.integers(0, 200, n), EOS] for n in text_lengths]
    documents[0] = documents[0][cut_front:]
    documents[-1] = documents[-1][: len(documents[-1]) - cut_back]
    lengths = [len(document) for document in documents]
    return TokenSplit(
        name="train",
        tokens=np.concatenate(documents).astype(dtype),
        document_starts=np.cumsum([0, *lengths[:-1]]),
        num_bytes=sum(text_lengths),
        content_hash="0123abcd",
    )


def unique_split():
    """A split in which a token names its position, so that batches can be traced back."""
    split = make_split()
    tokens = np.arange(len(split.tokens), dtype=np.uint16)
    return dataclasses.replace(split, tokens=tokens, num_bytes=1, content_hash="unique")


def document_of(split, positions):
    return np.searchsorted(split.document_starts, positions, side="right") - 1


def predictable(split):
    """Positions whose next token belongs to the same document."""
    before_start = np.append(split.document_starts[1:], len(split.tokens)) - 1
    return np.setdiff1d(np.arange(len(split.tokens)), before_start)


def contexts(batches):
    """Tokens in the state at each prediction, for a split from `unique_split`."""
    seen = {}
    carried = [[] for _ in batches[0].tokens]
    for batch in batches:
        for n in range(len(batch.tokens)):
            if batch.reset[n]:
                carried[n] = []
            for t, token in enumerate(batch.tokens[n]):
                if t and batch.segment_ids[n, t] != batch.segment_ids[n, t - 1]:
                    carried[n] = []
                carried[n].append(int(token))
                if batch.loss_mask[n, t]:
                    seen[int(token)] = tuple(carried[n])
    return seen
