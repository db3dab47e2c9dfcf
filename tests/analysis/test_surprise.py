"""Bits of a text, its surprising units, and the page."""

import html
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_data import byte_level, pretrained
from small_runs import TOKENIZERS, small_model

from simplernn_jax.analysis.surprise import (
    ScoredBlock,
    above_quantile,
    colored,
    cut_units,
    expected_text,
    render_page,
    score,
)
from simplernn_jax.errors import UserError
from simplernn_jax.inference import generate
from simplernn_jax.inference.engine import PrefixState

CHUNKS = [(0, PrefixState((), jnp.zeros((1, 1))))]
TEXT = "a b 12\n\nwörter <b>\r\nab\n"


def scored(text, **surprising):
    """A block of bytes of 2 bits, 1 more than expected; 5 at the first place of `surprising`."""
    data = text.encode()
    bits = np.full(len(data), 2, np.float32)
    for found in surprising.values():
        bits[data.index(found.encode())] = 5
    ids = np.frombuffer(data, np.uint8).astype(np.int32)
    return ScoredBlock(data, ids, np.arange(len(data)), bits, bits - 1, CHUNKS)


def cut(*blocks, by="line", **options):
    return list(cut_units(blocks, by, **options))


@pytest.mark.parametrize(("block", "name"), [("parallel", "bpe"), ("plain", "byte")])
def test_bits_are_those_of_the_model_across_chunks_and_blocks(block, name):
    """Of a model that a C function decodes, and of one that XLA decodes."""
    tokenizer, text = TOKENIZERS[name](), 30 * TEXT  # more than a chunk
    model = small_model(block, vocab_size=tokenizer.vocab_size + 1)
    blocks = list(score(model, tokenizer, [text[:7], "", text[7:]]))
    for part in blocks:
        for token, start in zip(part.ids, part.starts, strict=True):
            assert part.text.startswith(tokenizer.decode_bytes([token]), start)
    ids, bits, excess = (
        np.concatenate([getattr(part, name) for part in blocks])
        for name in ("ids", "bits", "excess")
    )
    assert tokenizer.decode(ids) == text
    before = np.array([tokenizer.bos_id, *ids], np.int32)
    logits, _ = model(jnp.asarray(before[None, :-1]))
    logprobs = np.asarray(jax.nn.log_softmax(logits[0])) / np.log(2)
    np.testing.assert_allclose(bits, -logprobs[np.arange(len(ids)), ids], rtol=1e-4)
    entropy = -np.sum(2**logprobs * logprobs, axis=1)
    np.testing.assert_allclose(excess, np.maximum(bits - entropy, 0), rtol=1e-4, atol=1e-4)

    expected = expected_text(model, tokenizer, blocks[2].before(len(blocks[2].ids) - 3))
    generation = generate(model, [before[:-3]], max_new_tokens=40, eos_id=tokenizer.eos_id)
    new = tokenizer.decode_bytes(generation.sequences()[0]).decode("utf-8", "ignore")
    assert expected == re.findall(r"\s*\S*", new)[0]


def test_tokens_that_are_no_pieces_of_the_text_and_bad_weights_are_rejected():
    tokenizer = pretrained(byte_level(add_prefix_space=True))
    model = small_model(vocab_size=tokenizer.vocab_size)
    with pytest.raises(UserError, match="not pieces of its text"):
        next(score(model, tokenizer, ["abc"]))
    model.embedding.embedding[...] = jnp.full_like(model.embedding.embedding[...], jnp.nan)
    with pytest.raises(UserError, match="not finite"):
        next(score(model, TOKENIZERS["byte"](), ["abc"]))


@pytest.mark.parametrize(
    ("by", "expected"),
    [
        ("line", ["a b 12", "wörter <b>", "ab"]),
        ("word", ["a", " b", " 12", "wörter", " <b>", "ab"]),
        ("token", [*"ab12w\ufffd\ufffdrter<b>ab"]),
    ],
)
def test_units_have_their_text_place_and_bits_however_the_text_is_cut(by, expected):
    blocks = [scored(TEXT[:3]), scored(TEXT[3:])] if by == "word" else [scored(TEXT)]
    units = cut(*blocks, by=by)
    assert [unit.text for unit in units] == expected
    for unit in units:
        rest = TEXT.encode().split(b"\n")[unit.line - 1][unit.column - 1 :]
        size = 1 if by == "token" else len(unit.text.encode())
        assert rest[:size].decode("utf-8", "replace") == unit.text
    ends = {"line": len("\n\r\n\n")}.get(by, 0)  # they belong to lines
    size = sum(len(text.replace("\ufffd", "x").encode()) for text in expected)
    assert sum(unit.bits for unit in units) == 2 * (size + ends)


def test_places_of_tokens_that_have_several_newlines_or_begin_with_one():
    starts, text = np.array([0, 3, 6]), b"ab\n\n\n cd"
    bits = np.full(3, 2, np.float32)
    block = ScoredBlock(text, np.zeros(3, np.int32), starts, bits, bits - 1, CHUNKS)
    places = [(unit.text, unit.line, unit.column) for unit in cut(block, by="token")]
    assert places == [("ab", 1, 1), ("cd", 4, 2)]
    # The second token belongs to the line whose indentation it has.
    assert [(unit.text, unit.bits) for unit in cut(block)] == [("ab", 2), (" cd", 4)]


def test_a_unit_is_as_surprising_as_its_most_surprising_character():
    wrong, long = cut(scored("äbcd\n" + 15 * "x" + "\n", first="c"))
    assert (wrong.bits, wrong.surprise, wrong.at) == (15, 4, 2)
    assert (long.bits, long.surprise, long.at) == (32, 1, 0)
    np.testing.assert_array_equal(wrong.place.ids, [*"äb".encode()])


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
    block = ScoredBlock(b"ab 12 3c", starts, starts, bits, bits, CHUNKS)
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


def test_units_of_a_stream_are_compared_with_those_before():
    (unit,) = cut(scored("a"))
    surprises = [1, 2, 3, 4, 3.2, 3.3, *10_000 * [-1], 0]
    units = (("", unit._replace(surprise=surprise)) for surprise in surprises)
    assert [found.surprise for _, found in above_quantile(units, 0.75)] == [3.3, 0]
    units = (("", unit._replace(surprise=surprise)) for surprise in [*10_000 * [-1], 0])
    assert len(list(above_quantile(units, 0.9999))) == 1


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
