"""Text in and out: characters stay complete, special tokens are never generated."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from small_data import bpe_of
from small_runs import small_model

from simplernn_jax.data import load_tokenizer, tokenizer_from_json
from simplernn_jax.data.infilling import Infilling
from simplernn_jax.data.tokenizer import InfillingTokenizer, ids_without_text, token_bytes
from simplernn_jax.errors import UserError
from simplernn_jax.inference import TextStream, generate, generate_text
from simplernn_jax.inference.text import RepeatedLines, StopStrings, suggest

BYTES = load_tokenizer("byte", None)
TEXT = "aß€😀 שלום\n漢字"
ROWS = 37
"""Draws of their own: some row outlives the first piece, whatever the model is."""


@functools.cache
def make_model(vocab_size=BYTES.vocab_size + 300):
    """A model with ids that the tokenizer lacks."""
    return small_model("parallel", vocab_size=vocab_size)


def word_pieces():
    """A SentencePiece-like tokenizer: a piece's blank is written only behind another piece."""
    vocabulary = {"▁to": 0, "▁be": 1, "▁or": 2, "<unk>": 3}
    vocabulary |= {f"<0x{byte:02X}>": 4 + byte for byte in range(256)}
    model = tokenizers.models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True)
    tokenizer = tokenizers.Tokenizer(model)
    decoders = tokenizers.decoders
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return tokenizer.to_str()


@pytest.mark.parametrize("step", [1, 2, 3, 50])
@pytest.mark.parametrize("repeats", [1, 40])
def test_a_stream_yields_every_character_once_complete(step, repeats):
    ids = BYTES.encode(TEXT * repeats)
    stream = TextStream(BYTES)
    pieces = [stream.feed(ids[start : start + step]) for start in range(0, len(ids), step)]
    assert "".join(pieces) == TEXT * repeats
    assert stream.finish() == ""


def test_bytes_that_form_no_character_are_replaced():
    stream = TextStream(BYTES)
    assert stream.feed([0xE2, 0x82]) == ""
    assert stream.feed([ord("a")]) == "\ufffda"
    assert stream.feed([0xF0, 0x9F]) == ""
    assert stream.finish() == "\ufffd"


def test_a_stream_decodes_after_its_context(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(word_pieces(), encoding="utf-8")
    tokenizer = load_tokenizer(str(path), None)
    assert tokenizer_from_json(tokenizer.to_json()).vocab_size == tokenizer.vocab_size
    stream = TextStream(tokenizer, [0, 1])
    byte_ids = [4 + byte for byte in "€".encode()]
    pieces = [stream.feed([token]) for token in [2, 0, *byte_ids, 1]]
    assert pieces == [" or", " to", "", "", "€", " be"]


@pytest.mark.parametrize("step", [1, 2, 5, 50])
@pytest.mark.parametrize(
    ("stops", "expected"),
    [(["stop"], "a "), (["end", "stop; an"], "a "), (["stops"], "a stop; an end"), ([], None)],
)
def test_text_ends_before_the_first_stop_string(stops, expected, step):
    text = "a stop; an end"
    strings, found = StopStrings(stops), ""
    for start in range(0, len(text), step):
        found += strings.feed(text[start : start + step])
        if strings.has_ended:
            break
        assert stops or found == text[: start + step]  # nothing is held back
    else:
        found += strings.finish()
    assert found == (expected or text)


def test_text_is_the_decoded_tokens_in_pieces():
    model, calls = make_model(), []
    settings = {"max_new_tokens": 70, "temperature": 1.0, "seed": 3}
    prompts = ["ab", "", "x€", *[""] * (ROWS - 3)]
    texts = generate_text(model, BYTES, prompts, on_text=calls.append, **settings)
    rows = [[BYTES.bos_id, *BYTES.encode(prompt)] for prompt in prompts]
    banned = [BYTES.bos_id, *range(BYTES.pad_id, BYTES.vocab_size + 300)]
    written = generate(model, rows, eos_id=BYTES.eos_id, banned_ids=banned, **settings)
    assert texts == [BYTES.decode(row) for row in written.sequences()]
    assert texts == ["".join(call[row] for call in calls) for row in range(ROWS)]
    assert len(calls) > 2


def test_one_id_for_bos_eos_and_pad_still_ends_a_text():
    class OneSpecial:
        vocab_size, bos_id, eos_id, pad_id = 2, 1, 1, 1
        fim_ids = ()

        def encode(self, text):
            return np.zeros(len(text), np.int32)

        def decode_bytes(self, ids):
            return b"a" * sum(int(token) == 0 for token in ids)

    texts = generate_text(
        make_model(2), OneSpecial(), [""] * 3, max_new_tokens=200, temperature=100.0
    )
    assert max(map(len, texts)) < 200


def test_a_tokenizer_of_another_model_is_refused():
    with pytest.raises(UserError, match="outside the vocabulary of 31"):
        generate_text(make_model(31), BYTES, "a", max_new_tokens=1)


def test_suggestions_continue_the_prefix_and_are_given_once():
    text = "def größe(x):\n    return x.größer and 'Größe'\n\nreturned = größer(value)\n" * 9
    base = bpe_of(text)
    tokenizer, vocab_size = InfillingTokenizer(base), base.vocab_size + 8
    model = make_model(vocab_size)
    infilling = Infilling(tokenizer, token_bytes(tokenizer, vocab_size))
    banned = [*ids_without_text(tokenizer, vocab_size)]
    fields = {"max_new_tokens": 6, "seed": 3, "temperature": 1.0}
    for prefix in (text[:19], text[:7]):
        best, *others = suggest(model, tokenizer, prefix, ")\nreturn", 5, **fields)
        assert len({best, *others}) == 1 + len(others) > 1
        prompt = infilling.prompt(prefix, ")\nreturn")
        ways = {}
        for number, ids in enumerate(prompt.first_ids):
            tokens = np.array([*prompt.tokens, *prompt.typed[:number]])
            logprobs = np.asarray(jax.nn.log_softmax(model(jnp.asarray(tokens[None]))[0][0]))
            before = logprobs[np.arange(-number - 1, -1), tokens[len(tokens) - number :]].sum()
            first = ids[np.argmax(logprobs[-1, ids])]
            ways[before + np.logaddexp.reduce(logprobs[-1, ids])] = number, first
        number, first = ways[max(ways)]
        typed = [*base.encode(prefix)[: -len(prompt.typed)], *prompt.typed[:number], first]
        settings = {"max_new_tokens": 5, "eos_id": tokenizer.eos_id, "banned_ids": banned}
        tokens = [*prompt.tokens, *prompt.typed[:number], first]
        rest = generate(model, [tokens], **settings).sequences()[0]
        assert tokenizer.decode([*typed, *rest]) == prefix + best
    with pytest.raises(UserError, match="fim_rate"):
        suggest(model, base, "a", "b", **fields)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\nb\nb\nb\n", "a\nb\n"),
        ("a\n\nb\n\nb", "a\n\nb\n\nb"),  # the last line may go on
        ("a\n\nb\n\nb\nc", "a\n\nb\n\n"),
        ("a\nb\na\nb\na\nb\n", "a\nb\na\n"),
        ("\n\n\n}\n  }\n", "\n\n\n}\n  }\n"),
    ],
)
def test_repeated_lines_end_a_text(text, expected):
    for size in (1, 2, 100):
        repeats, found = RepeatedLines(), ""
        for start in range(0, len(text), size):
            if not repeats.has_ended:
                found += repeats.feed(text[start : start + size])
        assert found + repeats.finish() == expected
