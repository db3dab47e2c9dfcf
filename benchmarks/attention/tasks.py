"""Synthetic tasks that query earlier tokens of a sequence, as training batches.

An answer is a target that never appears as an input: ``loss_mask`` is True exactly at queries.
Every sequence starts from a zero state.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from simplernn_jax.data.batches import Batch

BLANK = 0
"""Neutral token; also the target where there is no query."""


class Task(NamedTuple):
    """Sequences of one kind and length."""

    length: int
    vocab_size: int
    """Ids are in ``[0, vocab_size)``."""
    fill: Callable[[np.random.Generator, np.ndarray, np.ndarray], None]
    """Writes a sequence into tokens ``[T]``, all blank, and answers into ``[T]``, all -1."""

    def batch(self, batch_size: int, seed: int, index: int) -> Batch:
        """Draw batch `index` of the stream of `seed`."""
        key = np.random.SeedSequence(seed, spawn_key=(index,))
        random = np.random.Generator(np.random.Philox(key))
        tokens = np.full((batch_size, self.length), BLANK, np.int32)
        answers = np.full((batch_size, self.length), -1, np.int32)
        for sequence in range(batch_size):
            self.fill(random, tokens[sequence], answers[sequence])
        asked, ids = answers >= 0, np.zeros(tokens.shape, np.int32)
        targets = np.where(asked, answers, BLANK)
        return Batch(tokens, targets, asked, ids, np.ones(batch_size, bool))


def recall(pairs: tuple[int, ...], length: int, symbols: int) -> Task:
    """Multi-query associative recall, MQAR (Zoology, arXiv:2312.04927, section 3)::

        tokens   k1 v1 k2 v2 k3 v3  .  k2  .  .  .  k3 k1  .
        answers   .  .  .  .  .  .  . v2  .  .  .  v3 v1  .

    Distinct keys with distinct values, as many as one of `pairs`, then each key once more, in any
    order, among blanks. Unlike in the paper, keys are queried at uniform positions (there near the
    pairs, by a power law), and the vocabulary is smaller: the blank, keys, values.
    """

    def fill(random: np.random.Generator, tokens: np.ndarray, answers: np.ndarray) -> None:
        count = int(random.choice(pairs))
        keys, values = (1 + random.choice(symbols, count, replace=False) for _ in range(2))
        values += symbols
        tokens[0 : 2 * count : 2], tokens[1 : 2 * count : 2] = keys, values
        places = 2 * count + random.choice(length - 2 * count, count, replace=False)
        tokens[places], answers[places] = keys, values

    return Task(length, 1 + 2 * symbols, fill)


def copying(length: int, count: int, symbols: int, *, scattered: bool) -> Task:
    """Copying (arXiv:1511.06464, section 5.1) and selective copying (Mamba, arXiv:2312.00752)::

        tokens   a b c . . . . . ? ? ?        or, scattered,   . a . . b . . c ? ? ?
        answers  . . . . . . . . a b c                         . . . . . . . . a b c

    To copy, a model may count; scattered symbols it must distinguish from blanks. Each symbol has a
    query, as in the second paper. Ids: the blank, the distinct symbols, the query.
    """

    def fill(random: np.random.Generator, tokens: np.ndarray, answers: np.ndarray) -> None:
        drawn = 1 + random.integers(0, symbols, count)
        places = np.arange(count)
        if scattered:
            places = np.sort(random.choice(length - count, count, replace=False))
        tokens[places] = drawn
        tokens[-count:], answers[-count:] = 1 + symbols, drawn

    return Task(length, symbols + 2, fill)


def needle(distances: tuple[int, ...], length: int, symbols: int) -> Task:
    """One value in noise, queried at given distances; like passkey retrieval
    (Landmark attention, arXiv:2305.16300), without a language::

        tokens   n n n ! 7 n n n ? n n n n n ?      distances (4, 10)
        answers  . . . . . . . . 7 . . . . . 7

    The needle starts anywhere that leaves room for the queries. Ids: the blank (unused), noise,
    values, the mark before a value, the query.
    """

    def fill(random: np.random.Generator, tokens: np.ndarray, answers: np.ndarray) -> None:
        tokens[:] = random.integers(1, 1 + symbols, length)
        start = int(random.integers(0, length - 1 - max(distances)))
        value = 1 + symbols + random.integers(0, symbols)
        tokens[start], tokens[start + 1] = 2 * symbols + 1, value
        queries = [start + 1 + distance for distance in distances]
        tokens[queries], answers[queries] = 2 * symbols + 2, value

    return Task(length, 2 * symbols + 3, fill)
