"""Defects and rankings of ``benchmark.py scoring`` at tiny sizes."""

import random

import numpy as np
import pytest
from small_data import write
from small_runs import small_config, write_corpus

from benchmarks import scoring
from benchmarks.measure import Effort
from simplernn_jax.errors import UserError

pytestmark = pytest.mark.oldest_python

CODE = "import os\n\n\ndef first(path):\n    return os.stat(path).st_size == 1\n" * 3


def test_a_defect_changes_one_line():
    draw = random.Random(0)
    others = ["x = 1\ny = 2\n", CODE]
    for _ in range(50):
        for defect in (scoring.wrong_token(CODE, draw), scoring.wrong_line(CODE, others, draw)):
            if defect is not None:
                pairs = zip(CODE.split("\n"), defect[0].split("\n"), strict=True)
                assert [n for n, (old, new) in enumerate(pairs) if old != new] == [defect[1]]
    assert scoring.wrong_token("'''", draw) is None


def test_a_line_that_no_other_resembles_is_found_by_ngrams_and_gzip():
    text = "the quick brown fox\n" * 9 + "qzvj xkw pq 17\n" + "the quick brown fox\n" * 9
    tokens = np.frombuffer(("the quick brown fox\n" * 30).encode(), np.uint8)
    for ranking in (scoring.ngram_ranking(tokens), scoring.rank_by_gzip):
        assert np.argmax(ranking(text)) == 9
    bits = scoring.ngram_ranking(np.array([*b"abab", 256]))("b")
    # Of order 1, and halved by the 7 orders above, which saw a once at the beginning of a text.
    assert bits[0] == pytest.approx(7 - np.log2((2 + 2 / 256) / (4 + 2)))


def test_all_tables_are_measured(tmp_path, monkeypatch):
    config = small_config(
        "residual", source=write_corpus(tmp_path / "texts"), validation_fraction=0.3, steps=2
    )
    monkeypatch.setattr(scoring, "load_config", lambda name: config)
    monkeypatch.setattr(scoring, "DEFECTS", 2)
    monkeypatch.setattr(scoring, "LINES", (2, 40))
    monkeypatch.setattr(scoring, "texts_of", lambda trained: [CODE, CODE[5:]])
    logs = [str(write(tmp_path / name, "started 1\nstopped 2\n" * 30)) for name in "ab"]
    speed, *found = scoring.run(["1"], logs, Effort(1, 1))
    assert [row["vocabulary"] for row in speed.rows] == [259, 8192]
    for table in found:
        assert len(table.rows) == 5
        assert all(0 <= row["AUC"] <= 1 for row in table.rows)
    with pytest.raises(UserError, match="give one whole number"):
        next(scoring.run(["0"], logs, Effort(1, 1)))
    with pytest.raises(UserError, match="name longer ones"):
        scoring.split_logs(logs[:0], tmp_path / "halves")
