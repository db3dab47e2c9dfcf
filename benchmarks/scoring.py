"""Finding injected defects: lines ranked by `score.py`, compared with simple other rankings.

Held-out files of `--workdir`'s run get one wrong token, or one line of another place or file. Logs
get one such line, and the model is trained on what precedes them. Each ranking orders the lines of
a file; recall is the share of files whose defect is among the first 10 or 50 lines, and AUC the
share of the other lines that are ranked below it.
"""

import io
import keyword
import random
import tokenize
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from simplernn_jax import load_model
from simplernn_jax.analysis.surprise import Units
from simplernn_jax.data.batches import document_ends
from simplernn_jax.data.token_split import TokenSplit
from simplernn_jax.data.tokenizer import Tokenizer
from simplernn_jax.inference.scoring import Scorer
from simplernn_jax.models import LanguageModel
from simplernn_jax.training.preparation import open_saved_corpus

from .tables import Row, Table

DEFECTS = 200
LINES = (100, 600)
"""Lines of a file: fewer are easy, and more take long."""
_OTHERS = {
    "==": "!=", "!=": "==", "<": ">=", ">": "<=", "<=": "<", ">=": ">", "+": "-", "-": "+",
    "*": "+", "and": "or", "or": "and", "True": "False", "False": "True", "in": "is", "is": "in",
    ".": ",", ",": ".", ":": ";", "(": "[", ")": "]", "[": "(", "]": ")", "=": "==",
}  # fmt: skip
Defect = tuple[str, int]
"""A text, and the index of its wrong line."""
Ranking = Callable[[str], np.ndarray]
"""The surprise of every line of a text."""


def run(workdir: str) -> Iterator[Table]:
    """Tables of recall."""
    model, tokenizer, config = load_model(workdir)
    corpus = open_saved_corpus(workdir)
    files = list(texts_of(corpus.validation, tokenizer))
    draw = random.Random(0)
    rankings = {
        "model": lambda text: model_ranking(model, tokenizer, text),
        "n-gram of order 8": NGrams(corpus.train.tokens).ranking,
        "gzip": gzip_ranking,
        "length": lambda text: np.array([float(len(line)) for line in text.splitlines()]),
    }
    tokens = [one for one in (wrong_token(draw.choice(files), draw) for _ in range(400)) if one]
    lines = [wrong_line(draw.choice(files), draw.choice(files), draw) for _ in range(DEFECTS)]
    for name, defects in {"wrong token": tokens[:DEFECTS], "wrong line": lines}.items():
        yield Table(f"score: {name}", compare(defects, rankings))


def compare(defects: list[Defect], rankings: dict[str, Ranking]) -> list[Row]:
    """A row for each ranking."""
    rows: list[Row] = []
    for name, ranking in rankings.items():
        ranks, shares = [], []
        for text, wrong in defects:
            scores = ranking(text)
            # Lines of equal score are ranked in any order: half of them come first.
            ahead = np.sum(scores > scores[wrong]) + (np.sum(scores == scores[wrong]) - 1) / 2
            ranks.append(ahead)
            shares.append(1 - ahead / (len(scores) - 1))
        recall = {f"in the first {n}": float(np.mean(np.array(ranks) < n)) for n in (10, 50)}
        rows.append({"ranking": name, **recall, "AUC": float(np.mean(shares))})
    return rows


def texts_of(split: TokenSplit, tokenizer: Tokenizer) -> Iterator[str]:
    """Texts of the documents of a split that have neither few nor many lines."""
    for start, end in zip(split.document_starts, document_ends(split), strict=True):
        text = tokenizer.decode(split.tokens[start:end])
        if LINES[0] <= text.count("\n") <= LINES[1] and "\r" not in text:
            yield text


def wrong_token(text: str, draw: random.Random) -> Defect | None:
    """Replace a token of Python code by another one; None if it is no code."""
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    except (tokenize.TokenError, SyntaxError):
        return None
    names = {t.string for t in tokens if t.type == tokenize.NAME and not keyword.iskeyword(t.string)}
    found = [t for t in tokens if t.string in names or t.string in _OTHERS]
    if not found:
        return None
    token = draw.choice(found)
    new = _OTHERS.get(token.string)
    if new is None:
        at = draw.randrange(len(token.string))
        misspelled = token.string[:at] + token.string[at + 1 :]  # a character is missing
        other = draw.choice(sorted(names))
        new = draw.choice([misspelled, other]) if at else other
    lines = text.split("\n")
    (row, start), (_, end) = token.start, token.end
    changed = lines[row - 1][:start] + new + lines[row - 1][end:]
    if changed == lines[row - 1]:
        return None
    return "\n".join([*lines[: row - 1], changed, *lines[row:]]), row - 1


def wrong_line(text: str, other: str, draw: random.Random) -> Defect:
    """Replace a line by one of another place of the text, or of another text."""
    lines = text.split("\n")
    source = draw.choice([lines, other.split("\n")])
    at, new = draw.randrange(len(lines)), draw.choice(source)
    if not lines[at].strip() or not new.strip() or new.strip() == lines[at].strip():
        return wrong_line(text, other, draw)
    return "\n".join([*lines[:at], new, *lines[at + 1 :]]), at


def model_ranking(model: LanguageModel, tokenizer: Tokenizer, text: str) -> np.ndarray:
    """The ranking of score.py."""
    scores = np.zeros(text.count("\n") + 1)
    for unit in Units("line").cut(Scorer(model, tokenizer).feed(text)):
        scores[unit.line - 1] = max(scores[unit.line - 1], unit.surprise)
    return scores


def gzip_ranking(text: str) -> np.ndarray:
    """Bytes that each line adds to the DEFLATE of all the others."""
    lines = text.encode().split(b"\n")

    def size(parts: list[bytes]) -> int:
        return len(zlib.compress(b"\n".join(parts), 9))

    whole = size(lines)
    return np.array([whole - size(lines[:i] + lines[i + 1 :]) for i in range(len(lines))], float)


class NGrams:
    """Bytes given up to 7 before them, with backoff by Witten and Bell, counted in hash tables."""

    orders, bits = range(1, 9), 24

    def __init__(self, text: np.ndarray) -> None:
        self._counts, self._totals, self._kinds = {}, {}, {}
        for order, pair, context in self._hashes(np.asarray(text)):
            size = 1 << self.bits
            self._counts[order] = np.bincount(pair, minlength=size).astype(np.uint32)
            self._totals[order] = np.bincount(context, minlength=size).astype(np.uint32)
            _, first = np.unique(pair, return_index=True)
            kinds = np.bincount(context[first], minlength=size)
            self._kinds[order] = np.maximum(kinds, self._totals[order] > 0).astype(np.uint32)

    def _hashes(self, text: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Yield order and hashes of the last bytes of each position, with and without the byte."""
        padded = np.concatenate([np.zeros(8, np.uint64), text.astype(np.uint64)])
        context = np.zeros(len(text), np.uint64)
        prime, shift = np.uint64(0x9E3779B97F4A7C15), np.uint64(64 - self.bits)
        for order in self.orders:
            pair = (context + padded[8:] + np.uint64(1)) * prime
            yield order, (pair >> shift).astype(np.int64), (context >> shift).astype(np.int64)
            before = padded[8 - order : len(padded) - order]
            context = (context + (before + np.uint64(257)) * np.uint64(order)) * prime

    def ranking(self, text: str) -> np.ndarray:
        """Bits of every line."""
        data = np.frombuffer(text.encode(), np.uint8)
        p = np.full(len(data), 1 / 256)
        for order, pair, context in self._hashes(data):
            total, kinds = (x[order][context] for x in (self._totals, self._kinds))
            p = (self._counts[order][pair] + kinds * p) / np.maximum(total + kinds, 1e-9) + (
                (total == 0) * p
            )
        line = np.concatenate([[0], np.cumsum(data == ord("\n"))])[:-1]
        return np.bincount(line, -np.log2(p), minlength=text.count("\n") + 1)
