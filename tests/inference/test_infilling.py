"""Prompts of completions at a cursor: token healing against brute force, and suggestions."""

import functools

import jax
import numpy as np
import pytest
from small_data import bpe_of, char_tokenizer
from small_runs import small_model

from simplernn_jax.data import load_tokenizer
from simplernn_jax.data.infilling import infill_ids
from simplernn_jax.data.tokenizer import InfillingTokenizer, ids_without_text
from simplernn_jax.errors import UserError
from simplernn_jax.inference import generate
from simplernn_jax.inference.infilling import Infilling, suggest

TEXT = "def größe(x):\n    return x.größer and 'Größe'\n\nreturned = größer(return_value)\n" * 9
SUFFIX = ")\nreturn"
BASE = bpe_of(TEXT)


@functools.cache
def model():
    return small_model("residual", vocab_size=BASE.vocab_size + 8)


@pytest.mark.parametrize("order", ["suffix_first", "prefix_first"])
def test_the_first_token_begins_with_what_was_typed_of_it(order):
    """At all places: its distribution is the model's before the token, given these bytes."""
    tokenizer, num_healed = InfillingTokenizer(BASE, order), 0
    infilling = Infilling(tokenizer, model().config.vocab_size)
    for cut in range(46):
        prefix = TEXT[:cut]
        whole, prompt = infill_ids(tokenizer, prefix, SUFFIX), infilling.prompt(prefix, SUFFIX)
        if prompt.first_ids is None:
            assert prompt.tokens.tolist() == whole.tolist()
            continue
        num_healed += 1
        end = prompt.stable[-1]
        assert prompt.tokens.tolist() == [*whole[:end], *whole[end + 1 :]]
        typed = BASE.decode_bytes([whole[end]])
        is_like = [BASE.decode_bytes([i]).startswith(typed) for i in range(BASE.vocab_size + 8)]
        assert prompt.first_ids.tolist() == np.flatnonzero(is_like).tolist()
        if num_healed % 8 == 1:
            logits = generate(model(), [prompt.tokens], max_new_tokens=0).state.logits
            expected = np.where(is_like, np.exp(np.float64(logits[0])), 0)
            found = jax.nn.softmax(prompt.mask(logits)[0])
            np.testing.assert_allclose(found, expected / expected.sum(), rtol=1e-5)
            banned = prompt.first_ids[1:]  # without them, there is nothing to heal
            assert infilling.prompt(prefix, SUFFIX, (), banned).first_ids is None
    assert num_healed > 20


def test_bytes_and_characters_need_no_healing():
    for base in (load_tokenizer("byte"), char_tokenizer("".join(sorted(set(TEXT))))):
        known = InfillingTokenizer(base, "suffix_first")
        prompt = Infilling(known, known.vocab_size).prompt("größe", SUFFIX)
        assert (prompt.first_ids, prompt.num_typed) == (None, 0)
        assert prompt.tokens.tolist() == infill_ids(known, "größe", SUFFIX).tolist()


def test_suggestions_continue_the_prefix_and_are_given_once():
    tokenizer, vocab_size = InfillingTokenizer(BASE, "suffix_first"), model().config.vocab_size
    banned = [*ids_without_text(tokenizer, vocab_size)]
    fields = {"max_new_tokens": 6, "seed": 3, "temperature": 1.0}
    for prefix in (TEXT[:19], TEXT[:7]):
        best, *others = suggest(model(), tokenizer, prefix, SUFFIX, 5, **fields)
        assert len({best, *others}) == 1 + len(others) > 1
        prompt = Infilling(tokenizer, vocab_size).prompt(prefix, SUFFIX)
        logits = generate(model(), [prompt.tokens], max_new_tokens=0).state.logits
        first = prompt.first_ids[np.argmax(np.asarray(logits)[0, prompt.first_ids])]
        rest = generate(
            *(model(), [[*prompt.tokens, first]]),
            **{"max_new_tokens": 5, "eos_id": tokenizer.eos_id, "banned_ids": banned},
        )
        ids = [*BASE.encode(prefix)[:-1], first, *rest.sequences()[0]]
        assert tokenizer.decode(ids) == prefix + best
    with pytest.raises(UserError, match="fim_rate"):
        suggest(model(), BASE, "a", "b", **fields)
