"""Recordings of a model, which they leave unchanged."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_runs import small_config

from simplernn_jax.analysis.recording import find_mixers, record
from simplernn_jax.models import LanguageModel, SimpleRNN
from simplernn_jax.models.mixers.attention import Attention

TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 30, (2, 13)), jnp.int32)
SEGMENTS = jnp.asarray(np.stack([np.arange(13) // 5, np.zeros(13)]), jnp.int32)


def make_model(block="residual", **fields):
    config = small_config(block, vocab_size=30, **fields)
    return LanguageModel(config.model, rngs=nnx.Rngs(0))


@jax.jit
def record_and_repeat(model, tokens, state):
    """Return a recording, the result of the model itself, and of each mixer called again."""
    recording = record(model, tokens, state, SEGMENTS)
    again = [
        mixer(call.inputs, call.state, SEGMENTS)
        for mixer, call in zip(find_mixers(model), recording.layers, strict=True)
    ]
    return recording, model.hidden_states(tokens, state, SEGMENTS), again


@pytest.mark.fewer_cases
@pytest.mark.parametrize(
    ("block", "mixers"),
    [("plain", [SimpleRNN]), ("residual", [SimpleRNN]), ("residual", [SimpleRNN, Attention])],
)
def test_recording_changes_nothing(block, mixers):
    names = ["attention" if mixer is Attention else "simple_rnn" for mixer in mixers]
    model = make_model(block, num_layers=len(mixers), mixer=names, mixer_options={"context": 5})
    state = model.hidden_states(TOKENS)[1]
    recording, expected, again = record_and_repeat(model, TOKENS, state)
    chex.assert_trees_all_close((recording.hidden, recording.state), expected, rtol=1e-5)
    for call, repeated, before in zip(recording.layers, again, state, strict=True):
        chex.assert_trees_all_close((call.output, call.final_state), repeated, rtol=1e-5)
        chex.assert_trees_all_equal(call.state, before if block == "plain" else before.mixer)
    jax.eval_shape(lambda: record(model, TOKENS))
    assert [type(mixer) for mixer in find_mixers(model)] == mixers


def test_a_shift_between_embeddings_replaces_the_token():
    model = make_model()
    other = TOKENS.at[0, 4].set(29)

    @jax.jit
    def read(model):
        shift = model.embedding(other) - model.embedding(TOKENS)
        shifted = record(model, TOKENS, shift=shift).hidden
        return shifted, model.hidden_states(other)[0], model.hidden_states(TOKENS)[0]

    shifted, expected, unshifted = read(model)
    chex.assert_trees_all_close(shifted, expected, rtol=1e-5, atol=1e-5)
    assert not np.allclose(shifted, unshifted, atol=1e-3)
