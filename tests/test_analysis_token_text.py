"""Tokens as readable units, for bytes inside characters too."""

import numpy as np
import pytest

from simplernn_jax.analysis.token_text import Unit, split_into_units, sum_by_unit, visible
from simplernn_jax.data.tokenizer import ByteTokenizer, CharTokenizer

BYTES = ByteTokenizer()


def test_bytes_of_one_character_are_one_unit():
    ids = [BYTES.bos_id, *BYTES.encode("aé漢\n"), BYTES.eos_id]
    assert split_into_units(BYTES, ids) == [
        Unit(0, 1, "⟨BOS⟩"),
        Unit(1, 2, "a"),
        Unit(2, 4, "é"),
        Unit(4, 7, "漢"),
        Unit(7, 8, "\n"),
        Unit(8, 9, "⟨EOS⟩"),
    ]


@pytest.mark.parametrize("cut", [1, 2])
def test_a_character_cut_in_two_shows_its_bytes_and_then_itself(cut):
    ids = BYTES.encode("漢a")
    names = ["\\xe6", "\\xe6\\xbc"]
    assert split_into_units(BYTES, ids[:cut]) == [Unit(0, cut, names[cut - 1])]
    rest = split_into_units(BYTES, ids[cut:], context=ids[:cut])
    assert rest == [Unit(0, 3 - cut, "漢"), Unit(3 - cut, 4 - cut, "a")]


def test_units_hold_every_token_once():
    ids = np.random.default_rng(0).integers(0, 259, 97)
    units = split_into_units(BYTES, ids)
    assert [unit.start for unit in units] == [0, *(unit.stop for unit in units[:-1])]
    assert units[-1].stop == 97
    assert sum_by_unit(units, np.ones(97)).sum() == 97


def test_characters_are_units():
    tokenizer = CharTokenizer("\n ab")
    assert [unit.text for unit in split_into_units(tokenizer, [3, 1, 2, 4])] == [
        *("b", " ", "a"),
        "⟨BOS⟩",
    ]


def test_values_are_summed_over_the_tokens_of_a_unit():
    units = split_into_units(BYTES, BYTES.encode("é漢a"))
    np.testing.assert_array_equal(sum_by_unit(units, np.arange(6.0)), [1, 9, 5])


def test_what_cannot_be_seen_is_shown():
    assert visible("a b\n\tc\x00\u200b") == "a·b⏎⇥c\\x00\\u200b"
