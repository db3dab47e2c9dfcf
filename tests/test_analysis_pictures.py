"""Quotations in pictures: short, and drawn whole with the font that matplotlib brings."""

import numpy as np
import pytest

from simplernn_jax.analysis.map_pictures import draw_contributions, draw_maps, label_unit
from simplernn_jax.analysis.pictures import (
    beginning,
    ending,
    label_text,
    line_styles,
    sparse_markers,
)
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


def test_a_unit_is_quoted_in_its_word():
    units = units_of("for 漢 in hyphens: x")
    quotes = [label_unit(units, index) for index in (1, 2, 5, 11, 12, 18, 19)]
    assert quotes == [
        "     ⟨BOS⟩[f]or   21",
        "     ⟨BOS⟩f[o]r   20",
        "       [\\u6f22]   17",
        "     h[y]phens:    9",
        "     hy[p]hens:    8",
        "   hyphens:[·]x    2",
        "            [x]    1",
    ]


def test_axes_are_labelled_with_whole_words():
    class Axis:
        def set_ticks(self, places, names, **style):
            self.places, self.names = places, names

    axis = Axis()
    text = "The recurrence of attention reads a longsentencewithoutspaces or so, twice"
    label_text(axis, units_of(text)[1:], 100, 6)
    words = {name.rsplit(" ", 1)[0] for name in axis.names}
    for shown in words:
        whole = text.replace(" ", "·")
        assert shown.endswith("…") or f"·{shown}·" in f"·{whole}·", shown
    assert len(axis.names) >= 4
    for place, name in zip(axis.places, axis.names, strict=True):
        assert name.endswith(f" {100 + place}")
    label_text(axis, units_of("漢字" * 20)[1:], 0, 4)  # no spaces at all
    assert len(axis.names) == 4


def test_curves_differ_in_more_than_their_color():
    looks = [(s["linestyle"], s["marker"]) for s in line_styles(12)]
    assert len(set(looks)) == 12
    places = [range(*sparse_markers(200, index, 4)[:1], 200, 25) for index in range(4)]
    assert len(set().union(*places)) == sum(map(len, places))


def png_size(picture):
    return [int.from_bytes(picture[start : start + 4], "big") for start in (16, 20)]


def test_maps_grow_with_their_tokens_up_to_a_point():
    sizes = []
    for length in (101, 401, 1009):
        weights = np.eye(length)[None]
        picture = draw_maps(weights, units_of("x" * (length - 1)), 0, 3)
        sizes.append(png_size(picture))
    (small, _), (middle, _), (large, height) = sizes
    assert small < 1000 < middle < 1650 < large < 2130
    assert height < 2130


def test_characters_without_a_glyph_are_drawn_without_a_warning():
    units = units_of("漢字😀 ")
    picture = draw_contributions([("title", "nats", np.arange(5.0), 7.0)], units)
    assert picture.startswith(b"\x89PNG\r\n")
