"""The benchmark of completion: which places it chooses, and what counts as right."""

import numpy as np
import pytest

from benchmarks.completion import LONGEST, Cursor, Suggestion, choose, compare, finish_line
from benchmarks.ngrams import NGrams

FILES = ["a = 1\n\nif a:\n    b = 2", "x" * 2 * LONGEST + "\ncä = 3\n"]
LINE = Cursor("x\n", "return value", "\n\n", 4)


def test_cursors_are_at_characters_of_short_lines():
    found = choose(FILES, 200)
    assert {x.line for x in found} == {"a = 1", "if a:", "    b = 2", "cä = 3"}
    for x in found:
        assert not x.line[x.at].isspace()
        assert any(x.before + x.line + x.after == file for file in FILES)


def test_a_suggestion_is_right_if_it_is_the_rest_and_accepting_it_is_a_key():
    places = [LINE._replace(at=at) for at in range(len(LINE.line))]
    typed = [Suggestion(x, x.line[x.at :] if x.at % 7 == 4 else "return") for x in places]
    assert compare(typed[4:6], typed) == {"exact": 0.5, "saved": 1 - 5 / len(LINE.line)}


@pytest.mark.oldest_python
def test_the_ngram_model_continues_the_longest_known_context():
    text = np.frombuffer(b"def f():\n    return value\nreturn valuation\nreturn value\n", np.uint8)
    ngrams = NGrams(text)
    assert [finish_line(ngrams, LINE._replace(at=n)).text for n in (4, 9)] == ["rn value", "lue"]
    assert finish_line(ngrams, LINE._replace(line="ä return v", at=10)).text == "alue"
    # No context but the empty one is known, and its most frequent byte.
    assert NGrams(np.array([*b"aabaacaa", 256])).predict(b"zzz") == ord("a")
    bits = NGrams(np.array([*b"abab", 256])).bits(b"b\n")
    # Of order 1, and halved by the 7 orders above, which saw a once at the beginning of a text.
    assert bits[0] == pytest.approx(7 - np.log2((2 + 2 / 256) / (4 + 2)))
