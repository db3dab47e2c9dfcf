"""Bits of a text's tokens, compared with the model's own distributions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_data import byte_level, pretrained
from small_runs import TOKENIZERS, small_model

from simplernn_jax.errors import UserError
from simplernn_jax.inference import generate
from simplernn_jax.inference.scoring import Scorer, expected_text

TEXT = "a b 12\n\nwörter <b>\nab\n" * 30  # more than a chunk


@pytest.fixture(
    scope="module", params=[("residual", "byte"), ("plain", "byte"), ("residual", "bpe")], ids=str
)
def scored(request):
    """A model that a C function decodes or one that XLA decodes, its tokenizer, scored blocks."""
    block, name = request.param
    tokenizer = TOKENIZERS[name]()
    model = small_model(block, vocab_size=tokenizer.vocab_size + 1)
    scorer = Scorer(model, tokenizer)
    return model, tokenizer, [scorer.feed(part) for part in (TEXT[:7], "", TEXT[7:])]


def test_bits_are_negative_log_probabilities_across_chunks_and_blocks(scored):
    model, tokenizer, blocks = scored
    ids, bits, entropy = (
        np.concatenate([getattr(block, name) for block in blocks])
        for name in ("ids", "bits", "entropy")
    )
    assert tokenizer.decode(ids) == TEXT
    for block in blocks:
        for token, start in zip(block.ids, block.starts, strict=True):
            assert block.text.startswith(tokenizer.decode_bytes([token]), start)
    logits, _ = model(jnp.asarray([tokenizer.bos_id, *ids[:-1]])[None])
    logprobs = np.asarray(jax.nn.log_softmax(logits[0]), np.float64) / np.log(2)
    np.testing.assert_allclose(bits, -logprobs[np.arange(len(ids)), ids], rtol=1e-4)
    np.testing.assert_allclose(entropy, -np.sum(2**logprobs * logprobs, axis=1), rtol=1e-4)
    generation = generate(model, [[tokenizer.bos_id, *ids[:-1]]], max_new_tokens=0)
    next_bits = -jax.nn.log_softmax(generation.state.logits[0])[ids[-1]] / np.log(2)
    assert bits[-1] == pytest.approx(float(next_bits), rel=1e-5)


def test_the_expected_text_is_what_generate_continues_with(scored):
    model, tokenizer, blocks = scored
    index = len(blocks[2].ids) - 3
    ids = np.concatenate([[tokenizer.bos_id], blocks[0].ids, blocks[2].ids[:index]])
    new = generate(model, [ids], max_new_tokens=40, eos_id=tokenizer.eos_id).sequences()[0]
    text = tokenizer.decode_bytes(new).decode("utf-8", "ignore")
    expected = expected_text(model, tokenizer, blocks[2].before(index))
    assert text.startswith(expected)
    assert len(expected.split()) <= 1
    assert expected or not text


def test_tokens_that_are_no_pieces_of_the_text_and_bad_weights_are_rejected():
    tokenizer = pretrained(byte_level(add_prefix_space=True))
    model = small_model(vocab_size=tokenizer.vocab_size)
    with pytest.raises(UserError, match="not pieces of its text"):
        Scorer(model, tokenizer).feed("abc")
    model.embedding.embedding[...] = jnp.full_like(model.embedding.embedding[...], jnp.nan)
    with pytest.raises(UserError, match="not finite"):
        Scorer(model, TOKENIZERS["byte"]()).feed("abc")
