"""Bits of tokens, units and pages, against the model's own log-probabilities."""

import html
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_runs import small_model

from simplernn_jax.analysis.surprise import Page, Top, Units, read_blocks
from simplernn_jax.data.tokenizer import ByteTokenizer
from simplernn_jax.errors import UserError
from simplernn_jax.inference import generate
from simplernn_jax.inference.scoring import Scorer

TEXT = "a b 12\n\nwörter <b>\nab\n" * 30


@pytest.fixture(scope="module", params=["residual", "plain"])
def scorer_of(request):
    """Makes scorers of a model that a C function decodes, and of one that XLA decodes."""
    model = small_model(request.param, vocab_size=259)
    return lambda: Scorer(model, ByteTokenizer()), model


def test_bits_are_negative_log_probabilities_however_the_text_is_cut(scorer_of):
    new, model = scorer_of
    scorer = new()
    blocks = [scorer.feed(part) for part in (TEXT[:3], "", TEXT[3:600], TEXT[600:])]
    assert b"".join(block.text for block in blocks) == TEXT.encode()
    ids = np.concatenate([block.ids for block in blocks])
    logits, _ = model(jnp.asarray([256, *ids[:-1]])[None])
    nats = -np.asarray(jax.nn.log_softmax(logits[0].astype(jnp.float32)), np.float64)
    p, bit = np.exp(-nats), np.log(2)
    found = [np.concatenate(part) for part in zip(*(block.scores for block in blocks), strict=True)]
    np.testing.assert_allclose(found[0], nats[np.arange(len(ids)), ids] / bit, rtol=1e-4)
    np.testing.assert_allclose(found[1], np.sum(p * nats, axis=1) / bit, rtol=1e-4)


def test_the_expected_text_is_what_generate_writes(scorer_of):
    new, model = scorer_of
    scorer = new()
    scorer.feed("abc\n")
    block = scorer.feed(TEXT)
    index = 530  # in a later chunk
    prompt = np.concatenate([[256], np.frombuffer(b"abc\n", np.uint8), block.ids[:index]])
    new_ids = generate(model, [prompt], max_new_tokens=16, eos_id=257).sequences()[0]
    text = ByteTokenizer().decode_bytes(new_ids).decode("utf-8", "ignore")
    assert text.startswith(scorer.expected_text(block, index))


def test_units_cover_the_text_and_their_bits_add_up(scorer_of):
    new, _ = scorer_of
    for by in ("line", "word", "token"):
        scorer, units = new(), Units(by)
        blocks = [scorer.feed(part) for part in (TEXT[:8], TEXT[8:])]
        found = [unit for block in blocks for unit in units.cut(block)]
        assert "".join(TEXT.split()) == b"".join(unit.text for unit in found).decode().translate(
            {ord(" "): None, ord("\n"): None}
        )
        lines = TEXT.encode().split(b"\n")
        for unit in found:
            assert lines[unit.line - 1][unit.column :].startswith(unit.text), by
        assert sum(unit.bits for unit in found) <= sum(b.scores.bits.sum() for b in blocks)
    assert {unit.text.strip() for unit in found} >= {b"a", b"1", "ö".encode()[:1]}
    assert [unit.line for _, unit in _top(new(), 2)] == sorted(
        {unit.line: unit.surprise for _, unit in _top(new(), 99)},
        key=lambda line: -{u.line: u.surprise for _, u in _top(new(), 99)}[line],
    )[:2]


def _top(scorer, size, **options):
    top = Top(size)
    for unit in Units("line", **options).cut(scorer.feed(TEXT)):
        top.add("x", unit)
    return top.units()


def test_masked_fields_have_no_bits(scorer_of):
    new, _ = scorer_of
    log = "at 2026-12-01T10:00:00 id 123e4567-e89b-12d3-a456-426614174000 0xdeadbeef1 n=42 abc\n"
    masked = {}
    block = new().feed(log)
    for mask in ("time", "uuid", "hex", "digits"):
        (unit,) = Units("line", masks=(mask,)).cut(block)
        masked[mask] = unit.bits
    (whole,) = Units("line").cut(block)
    fields = {"time": "2026-12-01T10:00:00", "uuid": "123e4567-e89b-12d3-a456-426614174000"}
    for mask, field in fields.items():
        start = log.index(field)
        assert whole.bits - masked[mask] == pytest.approx(
            float(block.scores.bits[start : start + len(field)].sum()), rel=1e-4
        )
    assert max(masked["digits"], masked["hex"]) < whole.bits


def test_relative_ranks_a_line_below_others_of_its_kind(scorer_of):
    new, _ = scorer_of
    absolute = {u.line: u.surprise for _, u in _top(new(), 999)}
    relative = {u.line: u.surprise for _, u in _top(new(), 999, relative=True)}
    assert relative[1] == absolute[1]
    assert relative[5] == pytest.approx(absolute[5] - absolute[1])  # a line like line 1


def test_blocks_are_whole_lines_and_long_ones_are_cut_between_characters():
    text = "é" * 20_000 + "\nab\n" + "x" * 10
    data = text.encode()
    pieces = iter([data[:5], data[5:16_385], data[16_385:32_769], data[32_769:], b""])
    blocks = list(read_blocks(lambda size: next(pieces), "x"))
    assert "".join(blocks) == text
    assert max(map(len, blocks)) <= 1 << 14
    with pytest.raises(UserError, match="x: a binary file"):
        list(read_blocks(lambda size: b"a\0", "x"))


def test_the_page_shows_all_text_escaped(scorer_of):
    new, _ = scorer_of
    page, scorer = Page(), new()
    page.begin("<n>")
    block = scorer.feed(TEXT)
    page.add(block)
    page.end()
    (unit, *_) = Units("line").cut(block)
    shown = page.render("<n>", "m", [("<n>", unit, "<e>")])
    assert shown.count("&lt;n&gt;") > 1
    assert "expected <code>&lt;e&gt;" in shown
    assert "<n>" not in shown
    body = shown[shown.rindex("<pre>") :].replace("</body>\n</html>", "")
    assert html.unescape(re.sub(r"<[^>]*>", "", body)).strip() == TEXT.strip()
