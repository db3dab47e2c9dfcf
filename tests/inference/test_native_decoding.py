"""The C function that decodes a token equals the modules, bit by bit the same in any batch."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from references import needs_compiler

from simplernn_jax.config import ModelConfig
from simplernn_jax.devices import available_cores
from simplernn_jax.errors import UserError
from simplernn_jax.inference import engine, generate, quantize_model
from simplernn_jax.inference.decoder_weights import QUANTIZATIONS, decodes_natively
from simplernn_jax.models import LanguageModel
from simplernn_jax.ops.decode import decode_tokens
from simplernn_jax.ops.quantization import GROUP, quantize, rounded

pytestmark = needs_compiler

VOCAB = 71
SIZES = {
    "small": {"hidden_dim": 37, "key_dim": 12, "value_dim": 14, "num_heads": 2, "mlp_dim": 83},
    "wide": {"hidden_dim": 131, "key_dim": 19, "value_dim": 83, "num_heads": 1, "mlp_dim": 521},
}
KINDS = [("small", "none"), ("small", "int4"), *(("wide", kind) for kind in QUANTIZATIONS)]


@functools.cache
def make_model(sizes="small", quantize="none", **fields):
    wide = {"tie_embeddings": True, "block": "parallel"}
    fields = (wide if sizes == "wide" else {"tie_embeddings": False, "block": "residual"}) | fields
    config = ModelConfig(vocab_size=VOCAB, num_layers=2, **SIZES[sizes], **fields)
    return quantize_model(LanguageModel(config, rngs=nnx.Rngs(0)), quantize)


def packed(model):
    return engine.Engine(model).weights


step = jax.jit(decode_tokens)
forward = nnx.jit(lambda model, tokens: model(tokens))


def run(model, tokens):
    """Logits after each of ``tokens [N, T]``, and the last states."""
    batch = len(tokens)
    num_tokens = np.ones(batch, np.int32)
    logits, states = jnp.zeros((batch, VOCAB)), model.initial_state(batch)
    found = []
    for t in range(tokens.shape[1]):
        logits, _, states = step(packed(model), tokens[:, [t]], num_tokens, logits, states)
        found.append(np.asarray(logits))
    return np.stack(found, axis=1), states


def all_of(tokens):
    return np.full(len(tokens), tokens.shape[1], np.int32)


def draw_tokens(batch, length=6):
    return np.random.default_rng(0).integers(0, VOCAB, (batch, length), np.int32)


def assert_near(found, expected, quantize):
    """Products with integers round their inputs to 16 bits; norms of short vectors amplify that."""
    error = np.abs(np.asarray(found) - expected)
    largest, mean = (5e-3, 1e-4) if quantize in ("int8", "int4") else (3e-5, 3e-6)
    assert error.max() <= largest
    assert error.mean() <= mean


@pytest.mark.oldest_python
@pytest.mark.parametrize(("sizes", "quantize"), KINDS)
def test_equals_the_modules_and_does_not_depend_on_the_batch(sizes, quantize):
    model = make_model(sizes, quantize)
    assert decodes_natively(model)
    tokens = draw_tokens(32)
    logits, states = run(model, tokens)
    expected, expected_states = forward(model, tokens[:3])
    assert_near(logits[:3], expected, quantize)
    for ours, theirs in zip(*map(jax.tree.leaves, (states, expected_states)), strict=True):
        assert_near(ours[:3], theirs, quantize)
    for batch in (1, 3, 7):
        fewer, fewer_states = run(model, tokens[:batch])
        np.testing.assert_array_equal(fewer, logits[:batch])
        for ours, theirs in zip(*map(jax.tree.leaves, (fewer_states, states)), strict=True):
            np.testing.assert_array_equal(ours, theirs[:batch])


@pytest.mark.parametrize("quantize", ["none", "int4"])
@pytest.mark.parametrize(("shortest", "longest", "per_thread"), [(1, 1, 20), (20, 40, 8)])
def test_threads_that_take_groups_of_sequences_change_no_bit(
    quantize, shortest, longest, per_thread
):
    model = make_model("small", quantize)
    batch = per_thread * max(jax.device_count(), available_cores())
    draw = np.random.default_rng(1)
    lengths = draw.integers(shortest, longest, batch, np.int32, endpoint=True)
    lengths[::7] = 0
    tokens = draw_tokens(batch, longest)
    # What follows the tokens of a sequence is never read, not even where it is no id.
    tokens[np.arange(longest) >= lengths[:, None]] = VOCAB
    logits, states = jnp.full((batch, VOCAB), 3.0), model.initial_state(batch)
    for _ in range(2):  # the second call begins with states that differ
        found = step(packed(model), tokens, lengths, logits, states)
        assert np.isfinite(found[0]).all()
        for first in range(batch):  # one sequence is no group
            of_part = functools.partial(jax.tree.map, lambda x, i=first: x[i : i + 1])
            arguments = of_part((tokens, lengths, logits, states))
            chex.assert_trees_all_equal(of_part(found), step(packed(model), *arguments))
        logits, _, states = found


@pytest.mark.oldest_python
@pytest.mark.parametrize(("sizes", "quantize"), KINDS)
def test_results_do_not_depend_on_the_number_of_tokens_in_a_call(sizes, quantize):
    model, lengths = make_model(sizes, quantize), [1, 37, 93]
    tokens = draw_tokens(3, sum(lengths))
    expected, expected_states = run(model, tokens)
    logits, states = jnp.zeros((3, VOCAB)), model.initial_state(3)
    hidden = []
    for end, length in zip(np.cumsum(lengths), lengths, strict=True):
        piece = tokens[:, end - length : end]
        logits, final, states = step(packed(model), piece, all_of(piece), logits, states)
        np.testing.assert_array_equal(logits, expected[:, end - 1])
        hidden.append(final)
    chex.assert_trees_all_equal(states, expected_states)
    heads = model.logits(jnp.concatenate(hidden, axis=1))
    assert_near(heads, expected, quantize)


@pytest.mark.parametrize("count", [-1, 4, 2**31 - 1])
def test_a_wrong_number_of_tokens_is_refused(count):
    model = make_model()
    arguments = draw_tokens(2, 3), np.array([1, count], np.int32), jnp.zeros((2, VOCAB))
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"num_tokens: {count} is not in 0 to 3"):
        jax.block_until_ready(step(packed(model), *arguments, model.initial_state(2)))


@pytest.mark.parametrize("quantize", QUANTIZATIONS)
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.9, "top_k": 20}])
def test_generates_the_tokens_of_the_modules(quantize, settings, monkeypatch):
    model = make_model("small", quantize)
    settings = {"max_new_tokens": 200, "seed": 3, **settings}
    ours = generate(model, draw_tokens(3), **settings)
    monkeypatch.setattr(engine, "decodes_natively", lambda _: False)
    theirs = generate(model, draw_tokens(3), **settings)
    np.testing.assert_array_equal(ours.tokens, theirs.tokens)


def test_changed_parameters_are_packed_again():
    model = nnx.clone(make_model())
    before = generate(model, [1, 2], max_new_tokens=20).tokens
    model.layers[0].mlp_in.kernel.set_value(-model.layers[0].mlp_in.kernel[...])
    after = generate(model, [1, 2], max_new_tokens=20).tokens
    assert (before != after).any()
    np.testing.assert_array_equal(generate(make_model(), [1, 2], max_new_tokens=20).tokens, before)


def test_a_bfloat16_model_keeps_its_precision():
    model = make_model(precision="bfloat16")
    assert packed(model).in_proj.values.dtype == jnp.bfloat16
    tokens = draw_tokens(3)
    logits, _ = run(model, tokens)
    # Activations are rounded to 8 bits there, and not here.
    np.testing.assert_allclose(logits, forward(model, tokens)[0], rtol=0, atol=0.03)
    assert packed(quantize_model(model, "int8")).in_proj.values.dtype == jnp.int32


@pytest.mark.parametrize(
    "fields",
    [
        {"block": "plain"},
        {"mixer": "attention"},
        {"mixer": "simple_rnn,attention"},
        {"norm_epsilon": 1e-5},
    ],
)
def test_other_models_are_not_quantized(fields):
    model = make_model(**fields)
    assert not decodes_natively(model)
    with pytest.raises(UserError, match="quantize=int8: only models of parallel or residual"):
        quantize_model(model, "int8")
    with pytest.raises(UserError, match="must be one of none, bfloat16, int8, int4"):
        quantize_model(model, "int2")


@pytest.mark.parametrize(
    ("kind", "bits", "limit"), [("bfloat16", 16, 2**-8), ("int8", 8, 2**-8), ("int4", 4, 0.3)]
)
def test_rounding_to_values_that_a_format_keeps(kind, bits, limit):
    matrix = np.random.default_rng(0).normal(size=(GROUP + 3, 5)).astype(np.float32)
    matrix[:, 2] = 0
    matrix[:, 3] *= 1e-30
    found = np.asarray(rounded(jnp.asarray(matrix), kind))
    values, scales = (np.asarray(x) for x in quantize(jnp.asarray(found), kind))
    group = GROUP if kind == "int4" else GROUP + 3
    kept = values.astype(np.float32) * np.repeat(scales, group, axis=0)[: GROUP + 3]
    np.testing.assert_array_equal(kept, found)
    np.testing.assert_array_equal(rounded(jnp.asarray(found), kind), found)
    assert (np.abs(found - matrix) <= limit * np.abs(matrix).max(axis=0)).all()
    assert len(np.unique(found[:GROUP, 0])) <= 2**bits


def test_int4_has_less_error_than_symmetric_rounding_by_the_largest_weight():
    matrix = np.random.default_rng(0).normal(size=(GROUP, 101)).astype(np.float32)
    scale = np.abs(matrix).max(axis=0) / 7
    symmetric = np.rint(matrix / scale) * scale
    error = np.square(rounded(jnp.asarray(matrix), "int4") - matrix).mean()
    assert error < 0.75 * np.square(symmetric - matrix).mean()  # 0.78 without clipped scales


def test_quantizing_changes_a_copy():
    model = make_model("small")
    before = jax.tree.map(np.asarray, nnx.state(model))
    other = quantize_model(model, "int4")
    for old, new in zip(*map(jax.tree.leaves, (before, nnx.state(model))), strict=True):
        np.testing.assert_array_equal(old, new)
    assert (other.head.kernel[...] != model.head.kernel[...]).any()
    assert packed(other).in_proj.values.dtype == jnp.uint32
    assert quantize_model(model, "none") is model
