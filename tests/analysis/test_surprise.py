"""Units of a scored text, streams, and the page."""

import html
import re

import numpy as np
import pytest

from simplernn_jax.analysis.surprise import (
    BLOCK_BYTES,
    Threshold,
    Units,
    colored,
    read_blocks,
    render_page,
)
from simplernn_jax.errors import UserError
from simplernn_jax.inference.scoring import ScoredBlock

TEXT = "a b 12\n\nwörter <b>\r\nab\n"


def scored(text, **surprising):
    """A block of bytes of 2 bits, 1 more than expected; 5 at the first place of `surprising`."""
    data = text.encode()
    bits = np.full(len(data), 2, np.float32)
    for found in surprising.values():
        bits[data.index(found.encode())] = 5
    ids = np.frombuffer(data, np.uint8).astype(np.int32)
    return ScoredBlock(data, ids, np.arange(len(data)), bits, np.ones_like(bits), [(0, None)])


def cut(*blocks, by="line", **options):
    units = Units(by, **options)
    return [unit for block in blocks for unit in units.cut(block)]


@pytest.mark.parametrize(
    ("by", "expected"),
    [
        ("line", ["a b 12", "wörter <b>", "ab"]),
        ("word", ["a", " b", " 12", "wörter", " <b>", "ab"]),
        ("token", [*"ab12w", b"\xc3", b"\xb6", *"rter<b>ab"]),
    ],
)
def test_units_have_their_text_place_and_bits_however_the_text_is_cut(by, expected):
    blocks = [scored(TEXT[:3]), scored(TEXT[3:])] if by == "word" else [scored(TEXT)]
    units = cut(*blocks, by=by)
    expected = [x if isinstance(x, bytes) else x.encode() for x in expected]
    assert [unit.text for unit in units] == expected
    lines = TEXT.encode().split(b"\n")
    for unit in units:
        assert lines[unit.line - 1][unit.column :].startswith(unit.text)
    ends = {"line": len("\n\r\n\n")}.get(by, 0)  # they belong to lines
    assert sum(unit.bits for unit in units) == 2 * (sum(map(len, expected)) + ends)


def test_a_unit_is_as_surprising_as_its_most_surprising_character():
    wrong, long = cut(scored("abcd\n" + 15 * "x" + "\n", first="c"))
    assert (wrong.bits, wrong.surprise) == (13, 4)
    assert (long.bits, long.surprise) == (32, 1)
    assert wrong.around_peak() == ("ab", "c", "d")
    np.testing.assert_array_equal(wrong.place.ids, [*b"ab"])
    (inside,) = cut(scored("aöb", first="ö"))
    assert inside.around_peak() == ("a", "ö", "b")


@pytest.mark.parametrize(
    ("masks", "fields"),
    [
        (["digits"], "17 3"),
        (["hex"], "0xdeadbeef 12ab34cd"),
        (["digits", "uuid"], "123e4567-e89b-12d3-a456-426614174000 5"),
        (["time"], "2026-12-01T10:00:00.123+01:00 2026-12-01 10:00"),
    ],
)
def test_bits_of_masked_fields_do_not_count(masks, fields):
    line = "a decade " + " ".join(f"of={field}," for field in fields.split())
    block = scored(line, surprising=fields.split()[-1])
    (whole,), (masked,) = cut(block), cut(block, masks=masks)
    assert whole.bits - masked.bits == 2 * len(fields.replace(" ", "")) + 3
    assert (whole.surprise, masked.surprise) == (4, 1)
    starts, bits = np.array([0, 2, 6]), np.array([3, 5, 7], np.float32)
    block = ScoredBlock(b"ab 12 3c", starts, starts, bits, np.zeros(3), [(0, None)])
    assert [unit.bits for unit in cut(block, masks=["digits"])] == [3]  # tokens with a part of one


def test_relative_ranks_by_the_average_of_earlier_lines_of_the_kind():
    lines = "took 17 ms\n", "took 9 ms\n", "left 1 s\n", "end\n"
    block = scored("".join(lines), usual="17", new="end")
    usual, same, again, other = (unit.surprise for unit in cut(block))
    first, second, third, fourth = (unit.surprise for unit in cut(block, relative=True))
    assert first == usual
    assert second == same - (usual + usual) / 2
    assert third == pytest.approx(again - (usual + same + (usual + same) / 2) / 3)
    assert fourth == pytest.approx(other - (usual + same + again) / 3)  # the first of its kind


def test_a_threshold_is_the_quantile_of_what_came_before():
    threshold = Threshold(0.75)
    numbers = {1: False, 2: False, 3: False, 4: False, 3.2: False, 3.3: True}
    assert {x: threshold.is_exceeded(x) for x in numbers} == numbers
    for _ in range(10_000):
        threshold.is_exceeded(-1.0)
    assert threshold.is_exceeded(0.0)
    assert [Threshold(0).is_exceeded(x) for x in (1, 2)] == [False, False]


def test_blocks_are_whole_lines_and_long_ones_are_cut_between_characters():
    text = "é" * 3 * BLOCK_BYTES + "\nab\n\0" + "x" * 10
    data = text.encode() + b"\xff\n\xe9"
    position = 1

    def read(size):
        nonlocal position
        before, position = position - 1, position + size
        return data[before : position - 1]

    blocks = list(read_blocks(read, "x"))
    assert "".join(blocks) == text + "\ufffd\n\ufffd"
    assert max(map(len, blocks)) < 2 * BLOCK_BYTES
    pieces = iter([b"a", b"b\nc\nd", b"e\n", b""])
    assert list(read_blocks(lambda size: next(pieces), "x")) == ["ab\nc\n", "de\n"]
    with pytest.raises(UserError, match="x: a binary file"):
        list(read_blocks(lambda size: b"a\0", "x"))
    invalid = iter([b"\x80" * BLOCK_BYTES] * 5 + [b""])
    assert len(list(read_blocks(lambda size: next(invalid), "x"))) == 5


def test_the_page_shows_all_text_escaped():
    block = scored(TEXT, first="ö")
    shown = render_page("<n>", "m", {"<n>": colored(block)}, [("<n>", cut(block)[1], "<e>")])
    assert "expected <code>&lt;e&gt;" in shown
    assert '<a href="#&lt;n&gt;:3">' in shown
    assert "<n>" not in shown
    body = shown[shown.rindex("<pre>") :].replace("</body>\n</html>", "")
    assert re.findall(r'class="s3">(.*?)</span>', body) == ["ö"]
    assert '\n<a id="&lt;n&gt;:3"></a><span class="s1">w</span>' in body
    assert html.unescape(re.sub(r"<[^>]*>", "", body)).strip() == TEXT.strip()
