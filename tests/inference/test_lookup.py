"""Decoding with drafts gives the bits of decoding token by token, in fewer calls."""

import chex
import numpy as np
import pytest
from references import needs_compiler

from benchmarks.stress.lookup import MODELS, lookup, make_model
from simplernn_jax.inference import generate
from simplernn_jax.inference.lookup import RECENT

pytestmark = needs_compiler


@pytest.mark.oldest_python
def test_the_bits_are_those_of_decoding_token_by_token(tmp_path):
    cases = list(lookup(tmp_path, 80, seed=1))
    assert [case for case in cases if case.problem is not None] == []
    assert len({case.kind for case in cases}) == len(MODELS)


@pytest.mark.parametrize("num_before", [0, 2 * RECENT])
def test_drafts_of_repetitive_text_are_accepted(num_before):
    draw, model, count = np.random.default_rng(0), make_model(71), 200
    prompt = [*draw.integers(0, 71, num_before), *[1, 2, 3, 4] * 10]
    with_drafts, without = (
        generate(model, prompt, max_new_tokens=count, lookup=use) for use in (True, False)
    )
    chex.assert_trees_all_equal(with_drafts.tokens, without.tokens)
    chex.assert_trees_all_equal(with_drafts.state, without.state)
    assert with_drafts.accepted > count / 2
    assert without.accepted == 0
