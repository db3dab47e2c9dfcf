"""Speed of scoring, and finding injected defects by `score.py` and by simpler rankings of lines.

Held-out files of Python's library get one wrong token, or one line of another place or file. The
second halves of logs get one such line; the model was trained on the first. Recall is the share of
texts whose defect is among the first 10 or 50 lines, and AUC the share of lines ranked below it.
"""

import glob
import io
import keyword
import random
import re
import tempfile
import tokenize
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from simplernn_jax.analysis.surprise import BLOCK_BYTES, Units
from simplernn_jax.cli.config_files import load_config
from simplernn_jax.config import Config
from simplernn_jax.data.tokenizer import ByteTokenizer
from simplernn_jax.errors import UserError
from simplernn_jax.inference import generate
from simplernn_jax.inference.scoring import Scorer
from simplernn_jax.models import LanguageModel
from simplernn_jax.training.preparation import prepare

from .baselines.trainers import CALIBRATION, OurTrainer, seconds_per_step
from .measure import Effort, alternate, block_ratio, median
from .tables import Row, Table
from .train_steps import Trained, document_texts, train_on_corpus

DEFECTS = 200
LINES = (100, 600)
"""Lines of a text: fewer are easy, and more take long."""
LOGS = "/var/log/**/*.log"
"""Those that Debian's packages leave."""
_OTHERS = {
    "==": "!=", "!=": "==", "<": ">=", ">": "<=", "<=": "<", ">=": ">", "+": "-", "-": "+",
    "*": "+", "and": "or", "or": "and", "True": "False", "False": "True", "in": "is", "is": "in",
    ".": ",", ",": ".", ":": ";", "(": "[", ")": "]", "[": "(", "]": ")", "=": "==",
}  # fmt: skip
Defect = tuple[str, int]
"""A text, and the index of its wrong line."""
Ranking = Callable[[str], np.ndarray]
"""The surprise of every line of a text."""


def run(times: Sequence[str], logs: Sequence[str], effort: Effort) -> Iterator[Table]:
    """Tables of speed, and of recall by `base`, trained for some seconds on code and on logs.

    Raises:
      UserError: `times` is not one number of seconds, or the logs have too few lines.
    """
    if len(times) != 1 or not re.fullmatch(r"\d*[1-9]\d*", times[0]):
        raise UserError(f"--seconds={','.join(times)}: give one whole number over 0 for scoring")
    seconds = float(times[0])
    yield Table("score: speed", [compare_speed(size, effort) for size in (259, 8192)])
    draw = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        config = load_config("base")
        trained = train(config, seconds, f"{folder}/code")
        files = list(texts_of(trained))
        tries = (wrong_token(draw.choice(files), draw) for _ in range(10 * DEFECTS))
        tokens = [defect for defect in tries if defect is not None][:DEFECTS]
        yield Table("score: wrong tokens", compare(tokens, trained))
        lines = [wrong_line(draw.choice(files), files, draw) for _ in range(DEFECTS)]
        yield Table("score: wrong lines", compare(lines, trained))
        texts = split_logs(logs or glob.glob(LOGS, recursive=True), Path(folder, "halves"))
        config.data.source, config.data.split = f"{folder}/halves", "position"
        trained = train(config, seconds, f"{folder}/logs")
        lines = [wrong_line(draw.choice(texts), texts, draw) for _ in range(DEFECTS)]
        yield Table("score: wrong lines in logs", compare(lines, trained))


def compare_speed(vocab_size: int, effort: Effort) -> Row:
    """Time of scoring lines by a random `base`, relative to prefill of the same bytes."""
    config, tokenizer = load_config("base").model, ByteTokenizer()
    config.vocab_size = vocab_size
    model = LanguageModel(config, rngs=nnx.Rngs(0))
    text = 4 * Path(__file__).read_text(encoding="utf-8")
    prompt = np.concatenate([[tokenizer.bos_id], tokenizer.encode(text)])

    def score() -> float:
        scorer, units, total = Scorer(model, tokenizer), Units("line"), 0.0
        for start in range(0, len(text), BLOCK_BYTES):
            block = scorer.feed(text[start : start + BLOCK_BYTES])
            total += sum(unit.bits for unit in units.cut(block))
        return total

    prefill = lambda: generate(model, [prompt], max_new_tokens=0).state.logits  # noqa: E731
    times = alternate({"prefill": prefill, "score": score}, effort)
    row: Row = {"vocabulary": vocab_size}
    row |= {f"{name}, us/byte": 1e6 * median(x) / len(text) for name, x in times.items()}
    return row | {"score / prefill": block_ratio(times["score"], times["prefill"])}


def train(config: Config, seconds: float, workdir: str) -> Trained:
    """Train for about this time."""
    prepared, corpus, _ = prepare(config, workdir)
    trial = OurTrainer(prepared, corpus, config.train.steps, 0)
    per_step = seconds_per_step(trial, CALIBRATION * seconds)
    config.train.steps = max(2, int(seconds / per_step))
    config.optimizer.warmup_steps = min(100, config.train.steps // 10)
    return train_on_corpus(config, workdir)


def texts_of(trained: Trained) -> Iterator[str]:
    """Held-out documents that have neither few nor many lines."""
    split: Any = trained.corpus.validation  # by default there is one
    for text in document_texts(split, trained.corpus.tokenizer):
        if LINES[0] <= text.count("\n") <= LINES[1] and "\r" not in text:
            yield text


def split_logs(paths: Sequence[str], folder: Path) -> list[str]:
    """Write the first half of every log to `folder`; return the rest, in texts of few lines."""
    folder.mkdir()
    texts = []
    for number, path in enumerate(paths):
        lines = Path(path).read_text("utf-8", "replace").splitlines()
        half, step = len(lines) // 2, LINES[1] // 2
        (folder / f"{number}.txt").write_text("\n".join(lines[:half]), "utf-8")
        pieces = (lines[at : at + step] for at in range(half, len(lines), step))
        texts += ["\n".join(piece) for piece in pieces if len(piece) >= LINES[0]]
    if len(texts) < 2:
        raise UserError(f"--logs: fewer than two with {2 * LINES[0]} lines; name longer ones")
    return texts


def wrong_token(text: str, draw: random.Random) -> Defect | None:
    """Replace a token of Python code by another one; None if it is no code."""
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    except (tokenize.TokenError, SyntaxError):
        return None
    names = {x.string for x in tokens if x.type == tokenize.NAME} - {*keyword.kwlist}
    token = draw.choice([x for x in tokens if x.string in names or x.string in _OTHERS])
    at = draw.randrange(len(token.string))
    misspelled = token.string[:at] + token.string[at + 1 :]  # a character is missing
    new = _OTHERS.get(token.string) or draw.choice([misspelled or "_", draw.choice(sorted(names))])
    lines = text.split("\n")
    (row, start), (_, end) = token.start, token.end
    lines[row - 1] = lines[row - 1][:start] + new + lines[row - 1][end:]
    return None if new == token.string else ("\n".join(lines), row - 1)


def wrong_line(text: str, others: Sequence[str], draw: random.Random) -> Defect:
    """Replace a line by one of another place of the text, or of another text."""
    lines = text.split("\n")
    while True:
        source = draw.choice([text, draw.choice(others)]).split("\n")
        at, new = draw.randrange(len(lines)), draw.choice(source)
        if lines[at].strip() and new.strip() and new.strip() != lines[at].strip():
            return "\n".join([*lines[:at], new, *lines[at + 1 :]]), at


def compare(defects: Sequence[Defect], trained: Trained) -> list[Row]:
    """A row for each ranking, by the surprise of every line."""
    model, tokenizer = trained.model(), trained.corpus.tokenizer

    def by_model(text: str, relative: bool = False) -> np.ndarray:
        scores = np.full(text.count("\n") + 1, -np.inf)
        for unit in Units("line", relative=relative).cut(Scorer(model, tokenizer).feed(text)):
            scores[unit.line - 1] = unit.surprise
        return scores

    rankings: dict[str, Ranking] = {
        "score": by_model,
        "score --relative": lambda text: by_model(text, relative=True),
        "n-grams to order 8": ngram_ranking(trained.corpus.train.tokens),
        "gzip": rank_by_gzip,
        "length": lambda text: np.array([float(len(line)) for line in text.split("\n")]),
    }
    rows: list[Row] = []
    for name, ranking in rankings.items():
        ranks, shares = [], []
        for text, wrong in defects:
            scores = ranking(text)
            # Of lines of equal score, half come first.
            equal = np.sum(scores == scores[wrong]) - 1
            ranks.append(np.sum(scores > scores[wrong]) + equal / 2)
            shares.append(1 - ranks[-1] / (len(scores) - 1))
        recall = {f"in the first {n}": float(np.mean(np.array(ranks) < n)) for n in (10, 50)}
        rows.append({"ranking": name, **recall, "AUC": float(np.mean(shares))})
    return rows


def rank_by_gzip(text: str) -> np.ndarray:
    """Bytes that each line adds to the DEFLATE of all the others."""
    lines = text.encode().split(b"\n")
    sizes = [
        len(zlib.compress(b"\n".join(lines[:i] + lines[i + 1 :]), 9)) for i in range(len(lines))
    ]
    return -np.array(sizes, float)


def ngram_ranking(tokens: Any) -> Ranking:
    """Bits of bytes given up to 7 before them, with backoff by Witten and Bell (1991)."""
    tables = []
    for grams in _grams(np.asarray(tokens)):
        grams, counts = np.unique(grams, return_counts=True)
        contexts, first, kinds = np.unique(grams >> 8, return_index=True, return_counts=True)
        tables.append((grams, counts, contexts, np.add.reduceat(counts, first), kinds))

    def rank(text: str) -> np.ndarray:
        data = np.frombuffer(text.encode(), np.uint8)
        p = np.full(len(data), 1 / 256)
        for found, table in zip(_grams(data), tables, strict=True):
            grams, counts, contexts, *others = table
            count = _look_up(found, grams, counts)
            total, kinds = (_look_up(found >> 8, contexts, values) for values in others)
            p = np.where(total > 0, (count + kinds * p) / np.maximum(total + kinds, 1), p)
        line = np.cumsum(data == ord("\n")) - (data == ord("\n"))
        return np.bincount(line, -np.log2(p), minlength=text.count("\n") + 1)

    return rank


def _grams(text: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the last 1 to 8 bytes of each position, as numbers."""
    padded = np.concatenate([np.zeros(7), text[text < 256]]).astype(np.uint64)
    grams = np.zeros(len(padded) - 7, np.uint64)
    for order in range(8):
        grams = grams | (padded[7 - order : len(padded) - order] << np.uint64(8 * order))
        yield grams


def _look_up(wanted: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)
