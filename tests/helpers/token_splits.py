"""Small token splits and their properties, shared by the tests of batches."""

import dataclasses

import numpy as np

from simplernn_jax.data.token_store import TokenSplit

BOS, EOS, PAD = 200, 201, 202
TEXT_LENGTHS = (31, 0, 7, 13, 1, 101, 12, 43, 14, 3)


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
