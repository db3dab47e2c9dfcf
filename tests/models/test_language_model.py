"""The language model: shapes, causality, one state for every way of calling it, precision."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from simplernn_jax.config import ModelConfig
from simplernn_jax.models import LanguageModel
from simplernn_jax.models import language_model as initialization
from simplernn_jax.models.mixers.simple_rnn import GATE_BIAS_RANGE

PLAIN = ModelConfig(
    block="plain", vocab_size=29, num_layers=2, hidden_dim=13, key_dim=7, value_dim=11, num_heads=1
)
RESIDUAL = ModelConfig(
    vocab_size=29, num_layers=2, hidden_dim=14, key_dim=6, value_dim=10, num_heads=2, mlp_dim=17
)
# Two layers that look back over 11 tokens, and convolutions over 4, see all 19 between them.
ATTENTION = dataclasses.replace(
    RESIDUAL, key_dim=12, mixer="attention", mixer_options={"context": 11}
)
HYBRID = dataclasses.replace(ATTENTION, mixer="simple_rnn,attention")
GLA = dataclasses.replace(
    RESIDUAL, block="swiglu", mixer="gla", mixer_options={"short_convolution": 4}
)
MODELS = {"plain": PLAIN, "hybrid": HYBRID, "gla": GLA}
BATCH, LENGTH = 3, 19

call = nnx.jit(lambda model, tokens, segments=None: model(tokens, segment_ids=segments))


@functools.cache
def make_model(config):
    return LanguageModel(config, rngs=nnx.Rngs(0))


@pytest.fixture(params=MODELS)
def config(request):
    return MODELS[request.param]


def tokens():
    return jax.random.randint(jax.random.key(1), (BATCH, LENGTH), 0, 29)


def test_shapes_and_dtypes(config):
    model = make_model(config)
    logits, state = call(model, tokens())
    chex.assert_shape(logits, (BATCH, LENGTH, 29))
    assert logits.dtype == jnp.float32
    chex.assert_trees_all_equal_shapes_and_dtypes(state, model.initial_state(BATCH))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_step_by_step_decoding_equals_the_forward_pass(config, precision):
    """bfloat16 rounds activations at 2^-8, and a step rounds in another order than a chunk."""
    model = make_model(dataclasses.replace(config, precision=precision))
    whole, final = call(model, tokens())
    step = jax.jit(model)
    state, parts = model.initial_state(BATCH), []
    for t in range(LENGTH):
        logits, state = step(tokens()[:, t : t + 1], state)
        parts.append(logits)
    tolerance = 2e-5 if precision == "float32" else 5e-2
    chex.assert_trees_all_close(jnp.concatenate(parts, 1), whole, rtol=0, atol=tolerance)
    chex.assert_trees_all_close(state, final, rtol=0, atol=tolerance)


def test_segments_equal_separate_sequences(config):
    model = make_model(config)
    segments = jnp.broadcast_to(jnp.arange(LENGTH) // 7, (BATCH, LENGTH))
    logits, _ = call(model, tokens(), segments)
    for start in range(0, LENGTH, 7):
        alone, _ = call(model, tokens()[:, start : start + 7])
        chex.assert_trees_all_close(logits[:, start : start + 7], alone, rtol=0, atol=2e-5)


def test_causality_by_gradients(config):
    """Logits at t depend on the embedding of every token up to t, and of none after it."""
    model = make_model(config)
    graph, params = nnx.split(model, nnx.Param)
    row = jnp.arange(LENGTH)[None]  # every token is another id: its embedding stands for it

    def total_at(params, t):
        logits, _ = nnx.merge(graph, params)(row)
        # Row sums of a tied head see every embedding; one fixed logit sees that of token 28 only.
        return jnp.sum(logits[0, t, 28])

    gradients = jax.jit(jax.vmap(jax.grad(total_at), (None, 0)))(params, jnp.arange(LENGTH))
    influence = np.abs(np.asarray(gradients["embedding"]["embedding"][...])).sum(-1)[:, :LENGTH]
    reads = np.tri(LENGTH, dtype=bool)
    assert (influence[reads] > 0).all()
    assert (influence[~reads] == 0).all()


def test_gate_biases_are_spread_over_time_scales():
    model = make_model(RESIDUAL)
    bias = model.layers[0].mixer.cell.gate_proj.bias[...].reshape(2, 3)
    expected = jnp.tile(jnp.linspace(*GATE_BIAS_RANGE, 3)[None], (2, 1))
    chex.assert_trees_all_close(bias, expected)


def test_tied_and_untied_heads():
    tied = make_model(RESIDUAL)
    untied = make_model(dataclasses.replace(RESIDUAL, tie_embeddings=False))
    sizes = [
        sum(leaf.size for leaf in jax.tree.leaves(nnx.state(m, nnx.Param))) for m in (tied, untied)
    ]
    assert sizes[1] - sizes[0] == 14 * 29 + 29
    hidden, _ = tied.hidden_states(tokens())
    expected = hidden @ tied.embedding.embedding[...].T
    chex.assert_trees_all_close(tied.logits(hidden), expected, rtol=1e-5, atol=1e-5)


def test_wrong_calls_are_named(config):
    model = make_model(config)
    state = model.initial_state(1)
    for wrong, match in [
        (lambda: model(tokens()[0]), r"^tokens: expected \[B, T\], integer; got int32\[19\]"),
        (lambda: model(tokens(), state), r"^state\[0\].*: expected \[B, ...\] with B = 3; got "),
        (lambda: model(tokens()[:1], state[:1]), "^state: expected a tuple of 2 layer states"),
        (lambda: model(tokens(), None, tokens()[:1]), "^segment_ids: expected .* with B = 3"),
    ]:
        with pytest.raises(ValueError, match=match):
            wrong()
    with pytest.raises(TypeError, match=r"^tokens: .*; got float32\[3, 19\]"):
        model(tokens().astype(jnp.float32))


@pytest.mark.parametrize("config", ["hybrid", "gla"], indirect=True)
def test_initialized_parameters_are_those_of_the_constructor_traced_once(config, monkeypatch):
    traced = []

    class Recording(LanguageModel):
        def __init__(self, config, **options):
            traced.append(config)
            super().__init__(config, **options)

    monkeypatch.setattr(initialization, "LanguageModel", Recording)
    chosen = dataclasses.replace(config, hidden_dim=22)  # of no other test
    graph, params = initialization.initialize(chosen, jax.random.key(5))
    _, again = jax.jit(lambda: initialization.initialize(chosen, jax.random.key(5)))()
    _, abstract = initialization.abstract_model(chosen)
    assert len(traced) == 1
    model = LanguageModel(chosen, rngs=nnx.Rngs(jax.random.key(5)))
    expected = nnx.state(model, nnx.Param)
    chex.assert_trees_all_equal(params, again)
    chex.assert_trees_all_close(params, expected, rtol=1e-6)  # not compiled as a whole
    chex.assert_trees_all_equal_shapes_and_dtypes(abstract, expected)
    np.testing.assert_allclose(
        call(nnx.merge(graph, params), tokens())[0], call(model, tokens())[0], rtol=1e-5, atol=1e-5
    )

    chosen.num_layers = 3  # the cache has a copy
    initialization.abstract_model(dataclasses.replace(chosen, num_layers=2))
    assert len(traced) == 1


@pytest.mark.parametrize("shape", [(3, 0), (0, 3)])
def test_no_tokens_have_no_logits(config, shape):
    model = make_model(config)
    logits, _ = call(model, jnp.zeros(shape, jnp.int32))
    chex.assert_shape(logits, (*shape, 29))


@pytest.mark.parametrize("wrong", [-1, 29])
def test_ids_that_the_vocabulary_does_not_have(wrong):
    model = make_model(PLAIN)
    with pytest.raises(ValueError, match=rf"^tokens: expected ids in \[0, 29\); got {wrong}$"):
        model(tokens().at[1, 5].set(wrong))
