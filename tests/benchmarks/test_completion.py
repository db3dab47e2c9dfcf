"""The benchmark of completion: which places it chooses, and what counts as right."""

from small_runs import small_model

from benchmarks.completion import BATCH, LONGEST, Cursor, choose, measure, of_model, of_ngram
from simplernn_jax.data import load_tokenizer
from simplernn_jax.data.tokenizer import InfillingTokenizer

FILES = ["a = 1\n\nif a:\n    b = 2", "x" * 2 * LONGEST + "\ncä = 3\n"]
LINE = Cursor("x\n", "return value", "\n\n", 4)


def test_cursors_are_at_characters_of_short_lines():
    found = choose(FILES, 200)
    assert found == choose(FILES, 200)
    assert {x.line for x in found} == {"a = 1", "if a:", "    b = 2", "cä = 3"}
    for x in found:
        assert not x.line[x.at].isspace()
        assert x.after[:1] in ("", "\n")
        assert any(x.before + x.line + x.after == file for file in FILES)


def test_a_suggestion_is_right_if_it_is_the_rest_and_accepting_it_is_a_key():
    def suggest(cursor, places):
        return [cursor.line[at:] if at % 7 == 4 else "return" for at in places]

    found = measure(suggest, [LINE, LINE._replace(at=5)], [LINE])
    assert found == {"exact": 0.5, "saved": 1 - 5 / len(LINE.line)}
    nothing = measure(lambda _, places: [""] * len(places), [LINE], [LINE])
    assert nothing == {"exact": 0, "saved": 0}


def test_the_ngram_model_continues_the_longest_known_context():
    suggest = of_ngram(b"def f():\n    return value\nreturn valuation\nreturn value\n")
    assert suggest(LINE, [4, 9]) == ["rn value", "lue"]
    assert suggest(LINE._replace(line="ä return v"), [9]) == ["value"]
    # No context but the empty one is known, and its most frequent byte.
    assert of_ngram(b"aabaacaa")(LINE._replace(line="zzz"), [3])[0].startswith("a")


def test_places_of_a_line_have_the_suggestions_that_each_has_alone():
    tokenizer = InfillingTokenizer(load_tokenizer("byte"), "suffix_first")
    model = small_model("residual", vocab_size=tokenizer.vocab_size)
    suggest = of_model(model, tokenizer, has_suffix=False)
    line = LINE._replace(before="", line=LINE.line * 2)
    together = suggest(line, range(BATCH + 3))
    assert len(together) == BATCH + 3
    for at in (0, 5, BATCH - 1, BATCH + 2):
        (alone,) = suggest(line, [at])  # which may be shorter
        assert alone[:4] == together[at][:4]
