"""Contributions to one prediction: by gradient against differences, by the map against sums."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_runs import small_config

from simplernn_jax.analysis.accounts import LayerAccount
from simplernn_jax.analysis.contributions import gradient_contributions, map_contributions
from simplernn_jax.analysis.recording import record
from simplernn_jax.models import LanguageModel

TOKENS = np.random.default_rng(2).integers(0, 30, 7)
TARGET = 11


@pytest.mark.parametrize(("block", "filling"), [("plain", 0), ("residual", 0.3)])
def test_gradient_times_input_is_what_scaling_a_token_changes(block, filling):
    mixer = "simple_rnn" if block == "plain" else "simple_rnn,attention"
    config = small_config(block, vocab_size=30, num_layers=2, mixer=mixer, attention_context=5)
    model = LanguageModel(config.model, rngs=nnx.Rngs(0))
    tokens = jnp.asarray(TOKENS, jnp.int32)[None]
    state = jax.tree.map(lambda x: jnp.full_like(x, filling), model.initial_state(1))
    given = gradient_contributions(model, TOKENS, state, TARGET)
    embeddings = model.embedding(tokens)

    @jax.jit
    def log_probability(scales, state_scale):
        scaled = jax.tree.map(
            lambda x: x * state_scale if jnp.issubdtype(x.dtype, jnp.floating) else x, state
        )
        shift = embeddings * (scales - 1)[None, :, None]
        hidden = record(model, tokens, scaled, shift=shift).hidden
        return jax.nn.log_softmax(model.logits(hidden[0, -1]))[TARGET]

    step, ones = 1e-2, np.ones(7, np.float32)

    def slope(scales, state_scale):
        up = log_probability(ones + step * scales, 1 + step * state_scale)
        down = log_probability(ones - step * scales, 1 - step * state_scale)
        return float(up - down) / (2 * step)

    slopes = [slope(row, 0) for row in np.eye(7, dtype=np.float32)]
    np.testing.assert_allclose(given.tokens, slopes, rtol=0.02, atol=2e-4)
    assert given.state == pytest.approx(slope(0 * ones, 1), rel=0.02, abs=2e-4)
    assert np.abs(given.tokens).max() > 1e-2
    assert (abs(given.state) > 1e-3) == (filling > 0)


def test_shares_of_a_map_by_hand():
    # One head, two tokens, V = 2: y = 1 * (3, 0) + 0.5 * (0, 8) + (0, 0) = (3, 4).
    account = LayerAccount(
        weights=np.array([[[[2.0, 0.0], [1.0, 0.5]]]]),
        values=np.array([[[[3.0, 0.0]], [[0.0, 8.0]]]]),
        from_state=np.array([[[[1.0, 1.0]], [[0.0, 0.0]]]]),
        output=np.array([[[[7.0, 1.0]], [[3.0, 4.0]]]]),
        operator_error=np.float32(0),
        layer_error=np.float32(0),
    )
    given = map_contributions(account, 1)
    np.testing.assert_allclose(given.tokens, [9 / 25, 16 / 25])
    assert given.state == 0
    first = map_contributions(account, 0)
    np.testing.assert_allclose([*first.tokens, first.state], [42 / 50, 0, 8 / 50])
