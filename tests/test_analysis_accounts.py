"""The account of a whole layer: its parts make up its output, and one that is wrong shows it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_runs import HYBRID, small_config

from simplernn_jax.analysis.accounts import (
    LARGEST_ERROR,
    LayerAccount,
    account_for,
    account_for_layers,
    is_exact,
)
from simplernn_jax.analysis.recording import Record
from simplernn_jax.models import LanguageModel, SimpleRNN
from simplernn_jax.models.attention import Attention

BATCH, LENGTH, HEADS, VALUES, CONTEXT = 2, 13, 2, 7, 5
MIXERS = ("simple_rnn", "attention")


def recorded(mixer, dtype=jnp.float32, state_factor=1.0, past=17):
    """A layer with everything switched on, one call of it after others, and its segments."""
    options = {"rngs": nnx.Rngs(0), "output_norm": True, "output_gate": True, "dtype": dtype}
    if mixer == "attention":
        layer = Attention(11, 2 * 6, 2 * VALUES, 11, HEADS, context=CONTEXT, **options)
    else:
        layer = SimpleRNN(11, 2 * 3, 2 * VALUES, 11, HEADS, **options)
    x = np.random.default_rng(0).normal(size=(BATCH, past + LENGTH, 11))
    x = jnp.asarray(x, dtype)
    _, state = layer(x[:, :past])
    ids = jnp.asarray(np.stack([np.arange(LENGTH) // 4, np.zeros(LENGTH)]), jnp.int32)
    y, final_state = layer(x[:, past:], state, ids)
    changed = jax.tree.map(
        lambda leaf: leaf * state_factor if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf,
        state,
    )
    return layer, Record(x[:, past:], changed, y, final_state), ids


@jax.jit
def account(layer, record, ids):
    return account_for(layer, record, ids)


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize(("dtype", "layer_limit"), [(jnp.float32, 1e-6), (jnp.bfloat16, 1e-2)])
def test_the_parts_of_a_layer_make_up_its_output(mixer, dtype, layer_limit):
    given = account(*recorded(mixer, dtype))
    # Inside the operator all is float32; outside it bfloat16 may round the other way.
    assert given.operator_error < 1e-6
    assert given.layer_error < layer_limit
    assert given.weights.shape == (BATCH, HEADS, LENGTH, LENGTH)
    assert given.output.shape == given.from_state.shape == (BATCH, LENGTH, HEADS, VALUES)
    rebuilt = np.einsum("bhts,bshv->bthv", given.weights, given.values) + given.from_state
    np.testing.assert_allclose(given.output, rebuilt, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(given.from_state[0, 4:], 0)
    assert np.abs(given.from_state[:, :4]).min() > 0


@pytest.mark.parametrize("past", [0, 1, CONTEXT - 1, CONTEXT, CONTEXT + 1])
def test_attention_is_accounted_for_however_full_its_cache_is(past):
    given = account(*recorded("attention", past=past))
    assert max(given.operator_error, given.layer_error) < 1e-6
    # Of the second row, which is one segment: the cache is seen as long as the context reaches it.
    seen = np.abs(np.asarray(given.from_state[1])).max(axis=(-2, -1)) > 0
    np.testing.assert_array_equal(seen, np.arange(LENGTH) < (CONTEXT - 1 if past else 0))


@pytest.mark.parametrize("mixer", MIXERS)
def test_an_account_that_is_wrong_shows_it(mixer):
    right = account(*recorded(mixer))
    wrong = account(*recorded(mixer, state_factor=1.01))
    assert wrong.layer_error > 1e-4
    assert is_exact(right, is_float32=True)
    assert not is_exact(wrong, is_float32=True)


@pytest.mark.parametrize(
    ("operator_error", "layer_error", "exact", "exact_below_float32"),
    [
        (LARGEST_ERROR, LARGEST_ERROR, True, True),
        (2 * LARGEST_ERROR, 0, False, False),
        (0, 2 * LARGEST_ERROR, False, True),
        (np.nan, 0, False, False),
        (0, np.nan, False, True),
    ],
)
def test_both_errors_count_and_what_is_no_number(
    operator_error, layer_error, exact, exact_below_float32
):
    given = LayerAccount(None, None, None, None, operator_error, layer_error)
    assert is_exact(given, is_float32=True) is exact
    assert is_exact(given, is_float32=False) is exact_below_float32


def test_every_layer_of_a_model_has_an_account():
    config = small_config(**HYBRID, vocab_size=30, num_heads=2, attention_context=CONTEXT)
    model = LanguageModel(config.model, rngs=nnx.Rngs(0))
    state = jax.tree.map(jnp.ones_like, model.initial_state(1))
    for given in account_for_layers(model, np.arange(11), state):
        assert given.weights.shape == (1, 2, 11, 11)
        assert max(given.operator_error, given.layer_error) < 1e-6
        assert np.abs(given.from_state).max() > 1e-3
