"""Defects and rankings of ``benchmark.py scoring`` at tiny sizes."""

import random

import numpy as np
import pytest
from small_data import write
from small_runs import save_untrained, small_config

from benchmarks import scoring
from benchmarks.measure import Effort
from simplernn_jax.errors import UserError

pytestmark = pytest.mark.oldest_python

CODE = "import os\n\n\ndef first(path):\n    return os.stat(path).st_size == 1\n" * 3


LOG = "12:00 start of apt\n12:01 it's done\n" * 3


@pytest.mark.parametrize("text", [CODE, LOG])
@pytest.mark.parametrize("make", [scoring.wrong_token, scoring.wrong_line])
def test_a_defect_changes_one_line(text, make):
    draw, number = random.Random(0), 0
    for _ in range(50):
        if (found := make(text, [text.swapcase(), text], draw)) is None:
            continue
        changed, wrong = found
        pairs = zip(text.split("\n"), changed.split("\n"), strict=True)
        assert [n for n, (old, new) in enumerate(pairs) if old != new] == [wrong]
        number += 1
    assert number > 5


def test_no_token_is_replaced_if_there_is_no_other():
    draw = random.Random(0)
    for text in ("word word", "# x = 1"):
        assert scoring.wrong_token(text, [text], draw) is None
    assert scoring.wrong_token(LOG, [LOG, CODE], draw) is None  # of Python, only code


def test_all_tables_of_a_run(tmp_path, monkeypatch):
    for name in "abcd":
        write(tmp_path / "texts" / f"{name}.py", f"{name} = 1\n{CODE}")
    source = str(tmp_path / "texts")
    config = small_config("parallel", source=source, validation_fraction=0.5)
    save_untrained(config, tmp_path / "run")
    monkeypatch.setattr(scoring, "DEFECTS", 3)
    monkeypatch.setattr(scoring, "LINES", (10, 40))
    speed, *found = scoring.run([str(tmp_path / "run")], Effort(1, 1))
    assert speed.rows[0]["vocabulary"] == 259
    assert ["tokens" in table.title for table in found] == [True, False]
    for table in found:
        assert len(table.rows) == 6
        assert all(0 <= row["AUC"] <= 1 for row in table.rows)
    monkeypatch.setattr(scoring, "LINES", (100, 400))
    with pytest.raises(UserError, match="fewer than two texts of 100 lines"):
        list(scoring.run([str(tmp_path / "run")], Effort(1, 1)))
    with pytest.raises(UserError, match="names no run"):
        list(scoring.run([], Effort(1, 1)))


def test_a_line_that_no_other_resembles_is_found_by_ngrams_and_gzip():
    text = "the quick brown fox\n" * 9 + "qzvj xkw pq 17\n" + "the quick brown fox\n" * 9
    defects = [(text, 9)]
    ngrams = scoring.NGrams(np.frombuffer(b"the quick brown fox\n" * 30, np.uint8))
    rankings = {"n": scoring.by_ngrams(ngrams, np.add), "gzip": scoring.by_gzip}
    for row in scoring.compare(defects, rankings | {"equal": lambda text: np.zeros(20)}):
        expected = (1, 0.5) if row["ranking"] == "equal" else (1, 1)
        assert (row["in the first 10"], row["AUC"]) == expected
