"""Quotations in pictures: short, and drawn whole with the font that matplotlib brings."""

import numpy as np
import pytest

from simplernn_jax.analysis.map_pictures import draw_contributions, draw_maps, label_unit
from simplernn_jax.analysis.pictures import beginning, ending
from simplernn_jax.analysis.token_text import split_into_units
from simplernn_jax.data.tokenizer import ByteTokenizer


@pytest.mark.parametrize(
    ("text", "most", "expected"),
    [
        ("a b\n", 4, "a·b⏎"),
        ("abcde", 4, "abc…"),
        ("ü漢x", 8, "ü\\u6f22x"),
        ("漢字", 12, "\\u6f22\\u5b57"),
        ("漢字x", 12, "\\u6f22…"),  # an escape is whole or left out
        ("漢", 5, "…"),
        ("x\x00", 5, "x\\x00"),
        ("", 5, ""),
    ],
)
def test_the_beginning_of_a_quotation(text, most, expected):
    assert beginning(text, most) == expected


@pytest.mark.parametrize(
    ("text", "most", "expected"),
    [("a b\n", 3, "·b⏎"), ("字漢x", 8, "\\u6f22x"), ("漢x", 6, "x"), ("", 5, "")],
)
def test_the_end_of_a_quotation(text, most, expected):
    assert ending(text, most) == expected


def units_of(text):
    tokenizer = ByteTokenizer()
    return split_into_units(tokenizer, [tokenizer.bos_id, *tokenizer.encode(text)])


def test_a_unit_is_quoted_among_its_neighbours():
    units = units_of("for 漢 in 字典:")
    assert label_unit(units, 5) == "⟨BOS⟩for·[\\u6f22]·in·   14"
    assert label_unit(units, 1) == "   ⟨BOS⟩[f]or·…   18"


def png_size(picture):
    return [int.from_bytes(picture[start : start + 4], "big") for start in (16, 20)]


def test_maps_grow_with_their_tokens_up_to_a_point():
    sizes = []
    for length in (101, 401, 1009):
        weights = np.eye(length)[None]
        picture = draw_maps(weights, units_of("x" * (length - 1)), 0, 3)
        sizes.append(png_size(picture))
    (small, _), (middle, _), (large, height) = sizes
    assert small < 900 < middle < 1400 < large < 1800
    assert height < 1800


def test_characters_without_a_glyph_are_drawn_without_a_warning():
    units = units_of("漢字😀 ")
    picture = draw_contributions([("title", "nats", np.arange(5.0), 7.0)], units)
    assert picture.startswith(b"\x89PNG\r\n")
