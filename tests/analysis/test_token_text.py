"""Readable units of tokens, and their quotations in pictures."""

import numpy as np
import pytest

from simplernn_jax.analysis.token_text import (
    Unit,
    beginning,
    ending,
    label_text,
    label_unit,
    split_into_units,
    sum_by_unit,
    visible,
)
from simplernn_jax.data.tokenizer import ByteTokenizer, CharTokenizer

BYTES = ByteTokenizer()


def units_of(text):
    return split_into_units(BYTES, [BYTES.bos_id, *BYTES.encode(text).tolist()])


def test_bytes_of_one_character_are_one_unit():
    ids = [BYTES.bos_id, *BYTES.encode("aé漢\n").tolist(), BYTES.eos_id]
    units = split_into_units(BYTES, ids)
    assert [unit.text for unit in units] == ["⟨BOS⟩", "a", "é", "漢", "\n", "⟨EOS⟩"]
    assert [(unit.start, unit.stop) for unit in units[1:5]] == [(1, 2), (2, 4), (4, 7), (7, 8)]
    np.testing.assert_array_equal(sum_by_unit(units, np.arange(9.0)), [0, 1, 5, 15, 7, 8])
    tokenizer = CharTokenizer("\n ab")
    units = split_into_units(tokenizer, [3, 1, 2, 4])
    assert [unit.text for unit in units] == ["b", " ", "a", "⟨BOS⟩"]


@pytest.mark.parametrize(("cut", "name"), [(1, "\\xe6"), (2, "\\xe6\\xbc")])
def test_a_split_character_shows_its_bytes_and_is_completed_after_its_context(cut, name):
    ids = BYTES.encode("漢a")
    assert split_into_units(BYTES, ids[:cut]) == [Unit(0, cut, name)]
    rest = split_into_units(BYTES, ids[cut:], context=ids[:cut])
    assert rest == [Unit(0, 3 - cut, "漢"), Unit(3 - cut, 4 - cut, "a")]


def test_units_hold_every_token_once():
    units = split_into_units(BYTES, np.random.default_rng(0).integers(0, 259, 97))
    assert [unit.start for unit in units] == [0, *(unit.stop for unit in units[:-1])]
    assert units[-1].stop == 97


@pytest.mark.parametrize(
    ("quote", "text", "most", "expected"),
    [
        (beginning, "a b\n", 4, "a·b⏎"),
        (beginning, "abcde", 4, "abc…"),
        (beginning, "ü漢x", 8, "ü\\u6f22x"),
        (beginning, "漢字", 12, "\\u6f22\\u5b57"),
        (beginning, "漢字x", 12, "\\u6f22…"),  # an escape is whole or left out
        (beginning, "漢", 5, "…"),
        (beginning, "x\x00", 5, "x\\x00"),
        (beginning, "", 5, ""),
        (ending, "a b\n", 3, "·b⏎"),
        (ending, "字漢x", 8, "\\u6f22x"),
        (ending, "漢x", 6, "x"),
        (ending, "", 5, ""),
    ],
)
def test_quotations_are_cut_between_characters(quote, text, most, expected):
    assert quote(text, most) == expected


def test_invisible_characters_are_shown():
    assert visible("a b\n\tc\x00\u200b") == "a·b⏎⇥c\\x00\\u200b"


def test_a_unit_is_quoted_in_its_word():
    units = units_of("for 漢 in hyphens: x")
    assert [label_unit(units, index) for index in (1, 2, 5, 11, 12, 18, 19)] == [
        "     ⟨BOS⟩[f]or   21",
        "     ⟨BOS⟩f[o]r   20",
        "       [\\u6f22]   17",
        "     h[y]phens:    9",
        "     hy[p]hens:    8",
        "   hyphens:[·]x    2",
        "            [x]    1",
    ]


def test_axes_are_labeled_with_whole_words():
    class Axis:
        def set_ticks(self, places, names, **style):
            self.places, self.names = places, names

    axis = Axis()
    text = "The recurrence of attention reads a longsentencewithoutspaces or so, twice"
    label_text(axis, units_of(text)[1:], 100, 6)
    whole = "·" + text.replace(" ", "·") + "·"
    assert len(axis.names) >= 4
    for place, name in zip(axis.places, axis.names, strict=True):
        shown, position = name.rsplit(" ", 1)
        assert shown.endswith("…") or f"·{shown}·" in whole
        assert int(position) == 100 + place
    label_text(axis, units_of("漢字" * 20)[1:], 0, 4)  # no spaces at all
    assert len(axis.names) == 4
