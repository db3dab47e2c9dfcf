"""Synthetic tasks that ask for what stood earlier in a row, as batches of training.

Every task is a pure function of (seed, index), like `BatchSource`. An answer is a target that is
never shown as an input: ``loss_mask`` is True exactly where one is asked for, and accuracy is the
share of these positions whose likeliest token is the target. Every row begins from a zero state.
"""

import abc
import dataclasses

import numpy as np

from simplernn_jax.data.batches import Batch

BLANK = 0
"""Says nothing and asks for nothing; the target where none is asked for."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task(abc.ABC):
    """Rows of one kind, all of one length."""

    @property
    @abc.abstractmethod
    def vocab_size(self) -> int:
        """Ids are in ``[0, vocab_size)``."""

    @property
    @abc.abstractmethod
    def length(self) -> int:
        """Tokens per row."""

    @abc.abstractmethod
    def _fill(self, random: np.random.Generator, tokens: np.ndarray, answers: np.ndarray) -> None:
        """Writes one row into `tokens` [T], all blank, and what is asked for into `answers` [T],
        all -1."""

    def batch(self, rows: int, seed: int, index: int) -> Batch:
        """Batch `index` of the stream of `seed`: `rows` rows, another draw for each."""
        key = np.random.SeedSequence(seed, spawn_key=(index,))
        random = np.random.Generator(np.random.Philox(key))
        tokens = np.full((rows, self.length), BLANK, np.int32)
        answers = np.full((rows, self.length), -1, np.int32)
        for row in range(rows):
            self._fill(random, tokens[row], answers[row])
        asked = answers >= 0
        return Batch(
            tokens=tokens,
            targets=np.where(asked, answers, BLANK),
            loss_mask=asked,
            segment_ids=np.zeros(tokens.shape, np.int32),
            reset=np.ones(rows, bool),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AssociativeRecall(Task):
    """Multi-query associative recall, MQAR (Zoology, arXiv:2312.04927, section 3)::

        tokens   k1 v1 k2 v2 k3 v3  .  k2  .  .  .  k3 k1  .
        answers   .  .  .  .  .  .  . v2  .  .  .  v3 v1  .

    Pairs of a key and a value, then each key once more, in any order, among blanks; the answer is
    its value. Keys of a row differ, and so do values. As published but for two things: a key may
    come back anywhere (there near the pairs by a power law), and ids are fewer.
    """

    pairs: tuple[int, ...]
    """Pairs of a row: one of these, drawn anew for each row."""
    row_length: int
    """Tokens per row; at least 3 times the most pairs."""
    symbols: int = 128
    """Keys there are, and values as many; at least the most pairs."""

    def __post_init__(self) -> None:
        most = max(self.pairs)
        if 3 * most > self.row_length or most > self.symbols or min(self.pairs) < 1:
            raise ValueError(
                f"{self.pairs=} do not fit: {self.row_length=} must hold 3 tokens for each pair, "
                f"and {self.symbols=} a key for each"
            )

    @property
    def vocab_size(self) -> int:
        """The blank, the keys, the values, in this order."""
        return 1 + 2 * self.symbols

    @property
    def length(self) -> int:
        """Tokens per row."""
        return self.row_length

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

    At the end all symbols are asked for, in their order. To copy, a model may count; where
    symbols are scattered it must tell them from blanks. Each question is a token of its own, as in
    the second paper; in the first one is followed by blanks.
    """

    count: int = 16
    """Symbols of a row."""
    symbols: int = 14
    """Different symbols; 14, the blank and the question are the 16 ids of the second paper."""
    blanks: int
    """Blanks of a row."""
    scattered: bool
    """Symbols lie anywhere before the questions, rather than at the start."""

    @property
    def vocab_size(self) -> int:
        """The blank, the symbols, the question, in this order."""
        return self.symbols + 2

    @property
    def length(self) -> int:
        """Tokens per row: symbols, blanks, and a question for each symbol."""
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
    """One value in a row of noise, asked for at given distances; like passkey retrieval
    (Landmark attention, arXiv:2305.16300), without a language::

        tokens   n n n ! 7 n n n ? n n n n n ?      distances (4, 10)
        answers  . . . . . . . . 7 . . . . . 7

    The needle begins at any place from which the questions still fit.
    """

    distances: tuple[int, ...]
    """From the value to each question, in tokens; increasing, the first at least 1."""
    row_length: int
    """Tokens per row; at least 2 more than the greatest distance."""
    symbols: int = 32
    """Values there are, and tokens of noise as many."""

    def __post_init__(self) -> None:
        if min(self.distances) < 1 or max(self.distances) + 2 > self.row_length:
            raise ValueError(
                f"{self.distances=} do not fit {self.row_length=}, which must be at least 2 more "
                "than the greatest; the least is 1"
            )

    @property
    def vocab_size(self) -> int:
        """The blank (unused), the noise, the values, the mark before a value, the question."""
        return 2 * self.symbols + 3

    @property
    def length(self) -> int:
        """Tokens per row."""
        return self.row_length

    def _fill(self, random: np.random.Generator, tokens: np.ndarray, answers: np.ndarray) -> None:
        tokens[:] = random.integers(1, 1 + self.symbols, self.length)
        start = int(random.integers(0, self.length - 1 - max(self.distances)))
        value = 1 + self.symbols + random.integers(0, self.symbols)
        tokens[start], tokens[start + 1] = self.vocab_size - 2, value
        questions = [start + 1 + distance for distance in self.distances]
        tokens[questions], answers[questions] = self.vocab_size - 1, value
