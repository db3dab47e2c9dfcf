"""Speed of scoring, and finding injected defects by ``score.py`` and by simpler rankings of lines.

The texts are held-out files or logs of runs. A token is replaced by another one of the same text,
or a line by one of any of the texts. Recall is the share of texts whose defect is among the first
10 or 50 lines, and AUC the share of lines that are ranked below it.
"""

import ast
import functools
import io
import itertools
import random
import re
import tokenize
import zlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from simplernn_jax import load_model
from simplernn_jax.analysis.surprise import cut_units, score
from simplernn_jax.data import Tokenizer
from simplernn_jax.errors import UserError
from simplernn_jax.inference import generate
from simplernn_jax.models import LanguageModel
from simplernn_jax.training.preparation import open_saved_corpus

from .measure import Effort, alternate, block_ratio, median
from .ngrams import ORDER, NGrams
from .tables import Row, Table
from .train_steps import document_texts

DEFECTS = 200
LINES = (100, 600)
"""Lines of a text: fewer are easy, and more take long."""
TIMED = 1 << 16
"""Characters of text that are timed."""
Defect = tuple[str, int]
"""A text, and the index of its wrong line."""
Ranking = Callable[[str], np.ndarray]
"""The surprise of every line of a text."""


def run(workdirs: Sequence[str], effort: Effort) -> Iterator[Table]:
    """Tables of each run, of code or logs; `UserError` if there is none, or it holds out little."""
    if not workdirs:
        raise UserError("--workdirs: names no run; train some on code or logs")
    draw = random.Random(0)
    for workdir in workdirs:
        model, tokenizer, _ = load_model(workdir)
        corpus = open_saved_corpus(workdir)
        documents = document_texts(corpus.validation, tokenizer) if corpus.validation else []
        texts = [
            "\n".join(lines[start : start + LINES[1]])
            for lines in (document.split("\n") for document in documents if "\r" not in document)
            for start in range(0, len(lines), LINES[1])
            if len(lines) - start >= LINES[0]
        ]
        if len(texts) < 2:
            raise UserError(f"{workdir}: fewer than two texts of {LINES[0]} lines are held out")
        speed = compare_speed(model, tokenizer, "\n".join(texts)[:TIMED], effort)
        yield Table(f"score: speed, {workdir}", [speed])
        train_text = "\n".join(document_texts(corpus.train, tokenizer)).encode()
        ngrams = NGrams(np.frombuffer(train_text, np.uint8))
        rankings = {
            "score": by_model(model, tokenizer),
            "score --relative": by_model(model, tokenizer, relative=True),
            f"{ORDER}-grams": by_ngrams(ngrams, np.add),
            f"{ORDER}-grams, maximum": by_ngrams(ngrams, np.maximum),
            "gzip": by_gzip,
            "length": lambda text: np.array([float(len(line)) for line in text.split("\n")]),
        }
        defects = {}
        for kind, make in {"tokens": wrong_token, "lines": wrong_line}.items():
            tries = (make(draw.choice(texts), texts, draw) for _ in range(10 * DEFECTS))
            defects[kind] = [*itertools.islice(filter(None, tries), DEFECTS)]
        for kind, found in defects.items():
            title = f"score: {len(found)} wrong {kind}, {workdir}"
            yield Table(title, compare(found, rankings) if found else [])


def compare_speed(model: LanguageModel, tokenizer: Tokenizer, text: str, effort: Effort) -> Row:
    """Time of scoring lines, relative to prefill of the same text."""
    prompt = np.concatenate([[tokenizer.bos_id], tokenizer.encode(text)])
    candidates = {
        "prefill": lambda: generate(model, [prompt], max_new_tokens=0).state.logits,
        "score": lambda: by_model(model, tokenizer)(text),
    }
    times = alternate(candidates, effort)
    row: Row = {f"{name}, us/character": 1e6 * median(x) / len(text) for name, x in times.items()}
    ratio = block_ratio(times["score"], times["prefill"])
    return {"vocabulary": tokenizer.vocab_size} | row | {"score / prefill": ratio}


def wrong_token(text: str, others: Sequence[str], draw: random.Random) -> Defect | None:
    """Replace a token by another one of the text, if there is one.

    It is a name or an operator if any text is Python, else a word.
    """
    lines, spans = text.split("\n"), python_tokens(text)
    if spans is None:
        if any(python_tokens(other) for other in others):
            return None
        words = (re.finditer(r"\w+", line) for line in lines)
        spans = [(0, row, *word.span()) for row, found in enumerate(words) for word in found]
    kind = draw.choice([tokenize.NAME, tokenize.OP]) if spans and spans[0][0] else 0
    spans = [span for span in spans if span[0] == kind]
    strings = [(lines[row][start:end], row, start, end) for _, row, start, end in spans]
    if len({string for string, *_ in strings}) < 2:
        return None
    old, at, start, end = draw.choice(strings)
    new = draw.choice([string for string, *_ in strings if string != old])
    lines[at] = lines[at][:start] + new + lines[at][end:]
    return "\n".join(lines), at


@functools.cache
def python_tokens(text: str) -> list[tuple[int, int, int, int]] | None:
    """Kind, line, start and end of the names and operators of Python; None if it is no Python."""
    try:
        ast.parse(text)
        tokens = [*tokenize.generate_tokens(io.StringIO(text).readline)]
    except (tokenize.TokenError, SyntaxError, ValueError, RecursionError):
        return None
    return [
        (x.type, x.start[0] - 1, x.start[1], x.end[1])
        for x in tokens
        if x.type in (tokenize.NAME, tokenize.OP)
    ]


def wrong_line(text: str, others: Sequence[str], draw: random.Random) -> Defect | None:
    """Replace a line by one of another place of the text, or of another text, if it differs."""
    lines, source = text.split("\n"), draw.choice([text, draw.choice(others)]).split("\n")
    at, new = draw.randrange(len(lines)), draw.choice(source)
    if not lines[at].strip() or new.strip() in ("", lines[at].strip()):
        return None
    return "\n".join([*lines[:at], new, *lines[at + 1 :]]), at


def compare(defects: Sequence[Defect], rankings: dict[str, Ranking]) -> list[Row]:
    """A row for each ranking."""
    rows: list[Row] = []
    for name, ranking in rankings.items():
        shares, ranks = [], []
        for text, wrong in defects:
            scores = ranking(text)
            # Of lines of equal score, half come first.
            equal = np.sum(scores == scores[wrong]) - 1
            ranks.append(np.sum(scores > scores[wrong]) + equal / 2)
            shares.append(1 - ranks[-1] / (len(scores) - 1))
        recall = {f"in the first {n}": float(np.mean(np.array(ranks) < n)) for n in (10, 50)}
        rows.append({"ranking": name, **recall, "AUC": float(np.mean(shares))})
    return rows


def by_model(model: LanguageModel, tokenizer: Tokenizer, *, relative: bool = False) -> Ranking:
    """The ranking of ``score.py``; blank lines are last."""

    def rank(text: str) -> np.ndarray:
        scores = np.full(text.count("\n") + 1, -np.inf)
        blocks = score(model, tokenizer, [text])
        for unit in cut_units(blocks, "line", relative=relative):
            scores[unit.line - 1] = unit.surprise
        return scores

    return rank


def by_ngrams(ngrams: NGrams, join: np.ufunc) -> Ranking:
    """Bits of a line, the sum or the maximum over its characters."""

    def rank(text: str) -> np.ndarray:
        data = (text + "\n").encode()
        ends = np.flatnonzero(np.frombuffer(data, np.uint8) == ord("\n"))
        return join.reduceat(ngrams.bits(data), np.append(0, ends[:-1] + 1))

    return rank


def by_gzip(text: str) -> np.ndarray:
    """Bytes that each line adds to the DEFLATE of all the others."""
    lines = text.encode().split(b"\n")
    others = (b"\n".join(lines[:at] + lines[at + 1 :]) for at in range(len(lines)))
    return -np.array([len(zlib.compress(other, 9)) for other in others], float)
