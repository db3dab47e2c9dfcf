"""Synthetic tasks that query earlier tokens of a sequence, as training batches.

Every task is a pure function of (seed, index), like `BatchSource`. An answer is a target that never
appears as an input: ``loss_mask`` is True exactly at queries, and accuracy is the fraction of these
positions whose likeliest token is the target. Every sequence starts from a zero state.
"""

import abc
import dataclasses

import numpy as np

from simplernn_jax.data.batches import Batch

BLANK = 0
"""Neutral token; also the target where there is no query."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task(abc.ABC):
    """Sequences of one kind and length."""

    @property
    @abc.abstractmethod
    def vocab_size(self) -> int:
        """Ids are in ``[0, vocab_size)``."""

    @property
    @abc.abstractmethod
    def length(self) -> int:
        """Tokens per sequence."""

    @abc.abstractmethod
    def _fill(self, random: np.random.Generator, tokens: np.ndarray, answers: np.ndarray) -> None:
        """Write a sequence into `tokens` ``[T]``, all blank, and answers into `answers` ``[T]``,
        all -1."""

    def batch(self, batch_size: int, seed: int, index: int) -> Batch:
        """Draw batch `index` of the stream of `seed`."""
        key = np.random.SeedSequence(seed, spawn_key=(index,))
        random = np.random.Generator(np.random.Philox(key))
        tokens = np.full((batch_size, self.length), BLANK, np.int32)
        answers = np.full((batch_size, self.length), -1, np.int32)
        for sequence in range(batch_size):
            self._fill(random, tokens[sequence], answers[sequence])
        asked = answers >= 0
        return Batch(
            tokens=tokens,
            targets=np.where(asked, answers, BLANK),
            loss_mask=asked,
            segment_ids=np.zeros(tokens.shape, np.int32),
            reset=np.ones(batch_size, bool),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AssociativeRecall(Task):
    """Multi-query associative recall, MQAR (Zoology, arXiv:2312.04927, section 3)::

        tokens   k1 v1 k2 v2 k3 v3  .  k2  .  .  .  k3 k1  .
        answers   .  .  .  .  .  .  . v2  .  .  .  v3 v1  .

    Pairs of a key and a value, then each key once more, in any order, among blanks; the answer is
    its value. The keys of a sequence differ, and so do its values. Two differences to the paper:
    keys are queried at uniform positions (there near the pairs, by a power law), and the vocabulary
    is smaller.
    """

    pairs: tuple[int, ...]
    """Numbers of pairs, one of which is drawn for each sequence."""
    sequence_length: int
    """Tokens per sequence; at least 3 times the most pairs."""
    symbols: int = 128
    """Number of keys, and of values; at least the most pairs."""

    def __post_init__(self) -> None:
        most = max(self.pairs)
        if 3 * most > self.sequence_length or most > self.symbols or min(self.pairs) < 1:
            raise ValueError(
                f"{self.pairs=} do not fit: {self.sequence_length=} must hold 3 tokens per pair, "
                f"and {self.symbols=} a key per pair"
            )

    @property
    def vocab_size(self) -> int:
        """The blank, the keys, the values, in this order."""
        return 1 + 2 * self.symbols

    @property
    def length(self) -> int:
        """Tokens per sequence."""
        return self.sequence_length

    def _fill(self, random: np.random.Generator, tokens: np.ndarray, answers: np.ndarray) -> None:
        pairs = int(random.choice(self.pairs))
        keys, values = (1 + random.choice(self.symbols, pairs, replace=False) for _ in range(2))
        values += self.symbols
        tokens[0 : 2 * pairs : 2], tokens[1 : 2 * pairs : 2] = keys, values
        places = 2 * pairs + random.choice(self.length - 2 * pairs, pairs, replace=False)
        tokens[places], answers[places] = keys, values


@dataclasses.dataclass(frozen=True, kw_only=True)
class Copying(Task):
    """Copying (Arjovsky et al., arXiv:1511.06464, section 5.1) and selective copying (Mamba,
    arXiv:2312.00752, section 3.1)::

        tokens   a b c . . . . . ? ? ?        or, scattered,   . a . . b . . c ? ? ?
        answers  . . . . . . . . a b c                         . . . . . . . . a b c

    At the end all symbols are queried, in order. To copy, a model may count; scattered symbols it
    must distinguish from blanks. Each symbol has a query token, as in the second paper; in the
    first, one query is followed by blanks.
    """

    count: int = 16
    """Symbols per sequence."""
    symbols: int = 14
    """Distinct symbols; with the blank and the query, 14 make the 16 ids of the second paper."""
    blanks: int
    """Blanks per sequence."""
    scattered: bool
    """Symbols are anywhere before the queries, rather than at the start."""

    @property
    def vocab_size(self) -> int:
        """The blank, the symbols, the query, in this order."""
        return self.symbols + 2

    @property
    def length(self) -> int:
        """Tokens per sequence: symbols, blanks, and a query for each symbol."""
        return 2 * self.count + self.blanks

    def _fill(self, random: np.random.Generator, tokens: np.ndarray, answers: np.ndarray) -> None:
        symbols = 1 + random.integers(0, self.symbols, self.count)
        places = np.arange(self.count)
        if self.scattered:
            places = np.sort(random.choice(self.length - self.count, self.count, replace=False))
        tokens[places] = symbols
        tokens[-self.count :], answers[-self.count :] = 1 + self.symbols, symbols


@dataclasses.dataclass(frozen=True, kw_only=True)
class Needle(Task):
    """One value in noise, queried at given distances; like passkey retrieval
    (Landmark attention, arXiv:2305.16300), without a language::

        tokens   n n n ! 7 n n n ? n n n n n ?      distances (4, 10)
        answers  . . . . . . . . 7 . . . . . 7

    The needle starts at any position that leaves room for the queries.
    """

    distances: tuple[int, ...]
    """From the value to each query, in tokens; increasing, the first at least 1."""
    sequence_length: int
    """Tokens per sequence; at least 2 more than the greatest distance."""
    symbols: int = 32
    """Number of values, and of noise tokens."""

    def __post_init__(self) -> None:
        if min(self.distances) < 1 or max(self.distances) + 2 > self.sequence_length:
            raise ValueError(
                f"{self.distances=} do not fit {self.sequence_length=}, which must be at least 2 "
                "more than the greatest; the least is 1"
            )

    @property
    def vocab_size(self) -> int:
        """The blank (unused), the noise, the values, the mark before a value, the query."""
        return 2 * self.symbols + 3

    @property
    def length(self) -> int:
        """Tokens per sequence."""
        return self.sequence_length

    def _fill(self, random: np.random.Generator, tokens: np.ndarray, answers: np.ndarray) -> None:
        tokens[:] = random.integers(1, 1 + self.symbols, self.length)
        start = int(random.integers(0, self.length - 1 - max(self.distances)))
        value = 1 + self.symbols + random.integers(0, self.symbols)
        tokens[start], tokens[start + 1] = self.vocab_size - 2, value
        queries = [start + 1 + distance for distance in self.distances]
        tokens[queries], answers[queries] = self.vocab_size - 1, value
