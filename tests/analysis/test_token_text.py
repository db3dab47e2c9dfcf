"""Readable units of tokens."""

import numpy as np
import pytest

from simplernn_jax.analysis.token_text import Unit, split_into_units, sum_by_unit, visible
from simplernn_jax.data.tokenizer import ByteTokenizer

BYTES = ByteTokenizer()


def test_bytes_of_one_character_are_one_unit():
    ids = [BYTES.bos_id, *BYTES.encode("aé漢\n").tolist(), BYTES.eos_id]
    units = split_into_units(BYTES, ids)
    assert [unit.text for unit in units] == ["⟨BOS⟩", "a", "é", "漢", "\n", "⟨EOS⟩"]
    assert [(unit.start, unit.stop) for unit in units[1:5]] == [(1, 2), (2, 4), (4, 7), (7, 8)]
    np.testing.assert_array_equal(sum_by_unit(units, np.arange(9.0)), [0, 1, 5, 15, 7, 8])


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


def test_invisible_characters_are_shown():
    assert visible("a b\n\tc\x00\u200b") == "a·b⏎⇥c\ufffd\ufffd"
