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


@functools.cache
def tokenizer(order="suffix_first"):
    return InfillingTokenizer(bpe_of(TEXT), order)


@functools.cache
def model():
    return small_model("residual", vocab_size=tokenizer().vocab_size + 5)


@functools.cache
def infilling(order="suffix_first"):
    return Infilling(tokenizer(order), model().config.vocab_size)


def bytes_of(ids):
    return tokenizer().decode_bytes(ids)


@pytest.mark.parametrize("order", ["suffix_first", "prefix_first"])
def test_the_first_token_begins_with_what_was_typed_of_it(order):
    """At all places: its distribution is the model's before the token, given these bytes."""
    num_healed, base = 0, tokenizer(order)
    for cut in range(1, 46):
        prefix = TEXT[:cut]
        whole, prompt = infill_ids(base, prefix, SUFFIX), infilling(order).prompt(prefix, SUFFIX)
        end = prompt.stable[-1]
        if prompt.first_ids is None:
            assert prompt.tokens.tolist() == whole.tolist()
            continue
        num_healed += 1
        assert prompt.tokens.tolist() == [*whole[:end], *whole[end + 1 :]]
        typed = bytes_of([whole[end]])
        is_like = [bytes_of([i]).startswith(typed) for i in range(model().config.vocab_size)]
        assert prompt.first_ids.tolist() == np.flatnonzero(is_like).tolist()
        if num_healed % 8 == 1:
            logits = generate(model(), [prompt.tokens], max_new_tokens=0).state.logits
            expected = np.where(is_like, np.exp(np.float64(logits[0])), 0)
            found = jax.nn.softmax(prompt.mask(logits)[0])
            np.testing.assert_allclose(found, expected / expected.sum(), rtol=1e-5)
    assert num_healed > 20


def test_bytes_and_characters_need_no_healing():
    for base in (load_tokenizer("byte"), char_tokenizer("".join(sorted(set(TEXT))))):
        known = InfillingTokenizer(base, "suffix_first")
        prompt = Infilling(known, known.vocab_size).prompt("größe", SUFFIX)
        assert (prompt.first_ids, prompt.num_typed) == (None, 0)
        assert prompt.tokens.tolist() == infill_ids(known, "größe", SUFFIX).tolist()


def test_a_last_token_whose_continuations_are_banned_stays():
    found = infilling().prompt("r", "")
    assert found.first_ids is not None
    unhealed = infilling().prompt("r", "", banned_ids=found.first_ids[1:])
    assert unhealed.first_ids is None
    assert unhealed.tokens.tolist() == infill_ids(tokenizer(), "r", "").tolist()


def test_suggestions_continue_the_prefix_and_are_given_once():
    fields = {"max_new_tokens": 6, "seed": 3}
    for prefix in (TEXT[:19], TEXT[:7]):
        best, *others = suggest(
            model(), tokenizer(), prefix, SUFFIX, num=5, temperature=1.0, **fields
        )
        assert len({best, *others}) == 1 + len(others) > 1
        prompt = infilling().prompt(prefix, SUFFIX)
        logits = generate(model(), [prompt.tokens], max_new_tokens=0).state.logits
        first = prompt.first_ids[np.argmax(np.asarray(logits)[0, prompt.first_ids])]
        banned = ids_without_text(tokenizer(), model().config.vocab_size)
        eos = {"eos_id": tokenizer().eos_id, "banned_ids": [*banned]}
        rest = generate(model(), [[*prompt.tokens, first]], max_new_tokens=5, **eos)
        before = tokenizer().encode(prefix)[:-1]
        text = bytes_of([*before, first, *rest.sequences()[0]]).decode("utf-8", "replace")
        assert text == prefix + best
    with pytest.raises(UserError, match="fim_rate"):
        suggest(model(), bpe_of(TEXT), "a", "b", temperature=0, **fields)
