"""Maps against their definitions, exact sums, detected errors and known contributions."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from references import relative_rms
from small_runs import small_config

from simplernn_jax.analysis.decomposition import (
    LayerDecomposition,
    Record,
    attention_map,
    decompose_layer,
    gradient_contributions,
    is_exact,
    map_contributions,
)
from simplernn_jax.models import LanguageModel, SimpleRNN
from simplernn_jax.models.mixers.attention import Attention

BATCH, LENGTH, HEADS, KEYS, VALUES, CONTEXT = 2, 13, 2, 6, 7, 5
GATES = {"weak": (-1e-2, -1e-6), "mixed": (-9.0, 0.0), "strong": (-1e3, -30.0)}
MIXERS = ("simple_rnn", "attention")

call = nnx.jit(lambda layer, *arguments: layer(*arguments))
decompose = jax.jit(decompose_layer)


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("length", [1, 29])
@pytest.mark.parametrize(("dtype", "limit"), [(np.float32, 1e-6), (np.float64, 1e-14)])
def test_implicit_map_equals_its_definition(length, gates, dtype, limit):
    random = np.random.default_rng(length)
    shape = (BATCH, length, HEADS, KEYS)
    inputs = random.normal(size=shape), random.uniform(size=shape)
    inputs = [x.astype(dtype) for x in (*inputs, random.uniform(*GATES[gates], shape))]
    precise = jax.enable_x64(True) if dtype == np.float64 else contextlib.nullcontext()
    with precise:
        weights, state_queries = jax.device_get(jax.jit(attention_map)(*inputs))
    q, k, log_gate = (x.astype(np.float64) for x in inputs)
    expected = np.zeros((BATCH, HEADS, length, length))
    for t in range(length):
        for j in range(t + 1):
            decay = np.exp(log_gate[:, j + 1 : t + 1].sum(axis=1))
            expected[:, :, t, j] = np.sum(q[:, t] * k[:, j] * decay, axis=-1)
    assert weights.dtype == dtype
    assert relative_rms(weights, expected) < limit
    np.testing.assert_array_equal(np.triu(weights, 1), 0)
    # A gate below e^-16 counts as e^-16 in float32: 1e-7 of the queries.
    decayed = q * np.exp(np.cumsum(log_gate, axis=1))
    np.testing.assert_allclose(state_queries, decayed, rtol=20 * limit, atol=limit)


@functools.cache
def recorded(mixer, dtype=jnp.float32, state_factor=1.0, past=17):
    """Return a layer with all options and a recorded call after `past` tokens."""
    options = {"rngs": nnx.Rngs(0), "output_norm": True, "output_gate": True, "dtype": dtype}
    if mixer == "attention":
        layer = Attention(11, HEADS * KEYS, HEADS * VALUES, 11, HEADS, context=CONTEXT, **options)
    else:
        layer = SimpleRNN(11, HEADS * 3, HEADS * VALUES, 11, HEADS, **options)
    x = np.random.default_rng(0).normal(size=(BATCH, past + LENGTH, 11))
    x = jnp.asarray(x, dtype)
    _, state = call(layer, x[:, :past])
    y, _ = call(layer, x[:, past:], state)
    changed = jax.tree.map(
        lambda leaf: leaf * state_factor if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf,
        state,
    )
    return layer, Record(x[:, past:], changed, y)


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize(("dtype", "layer_limit"), [(jnp.float32, 1e-6), (jnp.bfloat16, 1e-2)])
def test_decomposition_sums_to_the_output(mixer, dtype, layer_limit):
    given = decompose(*recorded(mixer, dtype))
    # The operator computes in float32; outside it bfloat16 may round differently.
    assert given.operator_error < 1e-6
    assert given.layer_error < layer_limit
    assert given.weights.shape == (BATCH, HEADS, LENGTH, LENGTH)
    rebuilt = np.einsum("bhts,bshv->bthv", given.weights, given.values) + given.from_state
    np.testing.assert_allclose(given.output, rebuilt, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("past", [0, CONTEXT - 1, CONTEXT + 1])
def test_attention_is_decomposed_at_every_cache_length(past):
    given = decompose(*recorded("attention", past=past))
    assert max(given.operator_error, given.layer_error) < 1e-6
    seen = np.abs(np.asarray(given.from_state)).max(axis=(0, 2, 3)) > 0
    np.testing.assert_array_equal(seen, np.arange(LENGTH) < (CONTEXT - 1 if past else 0))


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_wrong_state_is_detected(mixer):
    exact = decompose(*recorded(mixer))
    assert is_exact(exact, is_float32=True)
    for is_float32 in (False, True):
        assert is_exact(exact._replace(layer_error=np.nan), is_float32) != is_float32
    assert not is_exact(decompose(*recorded(mixer, state_factor=1.01)), is_float32=True)


TOKENS = np.random.default_rng(2).integers(0, 30, 7)
TARGET = 11


@pytest.mark.parametrize(("block", "filling"), [("plain", 0), ("parallel", 0.3)])
def test_gradient_times_input_equals_the_slope_of_scaling(block, filling):
    mixer = "simple_rnn" if block == "plain" else "simple_rnn,attention"
    options = {"mixer": mixer, "mixer_options": {"context": 5}, "tie_embeddings": False}
    config = small_config(block, vocab_size=30, num_layers=2, **options)
    model = LanguageModel(config.model, rngs=nnx.Rngs(0))
    state = jax.tree.map(lambda x: jnp.full_like(x, filling), model.initial_state(1))
    given = gradient_contributions(model, TOKENS, state, TARGET)

    @nnx.jit
    def log_probability(model, scales, state_scale):
        """Scale each embedding, as that of a token of its own; the head is another matrix."""
        scaled = jax.tree.map(
            lambda x: x * state_scale if jnp.issubdtype(x.dtype, jnp.floating) else x, state
        )
        table = model.embedding.embedding
        table.set_value(table[...][TOKENS] * scales[:, None])
        logits, _ = model(jnp.arange(7, dtype=jnp.int32)[None], scaled)
        return jax.nn.log_softmax(logits[0, -1])[TARGET]

    step, ones = 1e-2, np.ones(7, np.float32)

    def slope(scales, state_scale):
        up, down = (
            log_probability(nnx.clone(model), ones + sign * scales, 1 + sign * state_scale)
            for sign in (step, -step)
        )
        return float(up - down) / (2 * step)

    slopes = [slope(one, 0) for one in np.eye(7, dtype=np.float32)]
    np.testing.assert_allclose(given.tokens, slopes, rtol=0.02, atol=2e-4)
    assert given.state == pytest.approx(slope(0 * ones, 1), rel=0.02, abs=2e-4)
    assert np.abs(given.tokens).max() > 1e-2
    assert (abs(given.state) > 1e-3) == (filling > 0)


def test_map_contributions_of_a_known_map():
    # One head, two tokens, V = 2: y = 1 * (3, 0) + 0.5 * (0, 8) + (0, 0) = (3, 4).
    layer = LayerDecomposition(
        weights=np.array([[[[2.0, 0.0], [1.0, 0.5]]]]),
        values=np.array([[[[3.0, 0.0]], [[0.0, 8.0]]]]),
        from_state=np.array([[[[1.0, 1.0]], [[0.0, 0.0]]]]),
        output=np.array([[[[7.0, 1.0]], [[3.0, 4.0]]]]),
        operator_error=np.float32(0),
        layer_error=np.float32(0),
    )
    given = map_contributions(layer, 1)
    np.testing.assert_allclose(given.tokens, [9 / 25, 16 / 25])
    assert given.state == 0
    first = map_contributions(layer, 0)
    np.testing.assert_allclose([*first.tokens, first.state], [42 / 50, 8 / 50])
