"""Parallel and residual blocks against their equations, and its parts: cell and dropout."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from processes import run_python

from simplernn_jax.config import ModelConfig
from simplernn_jax.models import SimpleRNN, SimpleRNNCell
from simplernn_jax.models.blocks import BLOCKS
from simplernn_jax.models.layers import dropout
from simplernn_jax.ops import gated_linear_recurrence

BATCH, LENGTH, WIDTH, HEADS = 2, 11, 14, 2


def block_of(name, precision):
    config = ModelConfig(
        vocab_size=29,
        num_layers=1,
        hidden_dim=WIDTH,
        key_dim=6,
        value_dim=10,
        num_heads=HEADS,
        mlp_dim=17,
        precision=precision,
    )
    return BLOCKS[name](config, "simple_rnn", rngs=nnx.Rngs(0))


def normalised(x):
    return x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)


def by_hand(block, x):
    """The equations of `ResidualBlock` or `ParallelBlock`, all in float32."""
    cell = block.mixer.cell

    def linear(layer, x):
        y = x @ layer.kernel[...]
        return y if layer.bias is None else y + layer.bias[...][None, None]

    def heads(y):
        return y.reshape(BATCH, LENGTH, HEADS, -1)

    past = jnp.pad(normalised(x), ((0, 0), (3, 0), (0, 0)))
    weights = block.convolution.weights[...]
    u = sum(weights[None, None, n] * past[:, 3 - n : 3 - n + LENGTH] for n in range(4))
    y, _ = gated_linear_recurrence(
        heads(linear(cell.query_proj, u)) * 3**-0.5,
        heads(jax.nn.sigmoid(linear(cell.key_proj, u))),
        heads(linear(cell.value_proj, u)),
        heads(jax.nn.log_sigmoid(linear(cell.gate_proj, u))),
    )
    y = normalised(y).reshape(BATCH, LENGTH, -1)
    y = y * jax.nn.silu(linear(cell.output_gate_proj, u))
    x = x + linear(cell.out_proj, y)
    hidden = linear(block.mlp_in, u if block.is_parallel else normalised(x))
    return x + linear(block.mlp_out, jax.nn.relu(hidden) ** 2)


# Operands of bfloat16 have 8 bits, and an entry is a sum of several roundings.
@pytest.mark.parametrize(("precision", "limit"), [("float32", 1e-5), ("bfloat16", 3e-2)])
@pytest.mark.parametrize("name", ["parallel", "residual"])
def test_value_and_gradients(name, precision, limit):
    graph, params = nnx.split(block_of(name, precision))
    # Away from where it starts, at zero biases and a convolution that is none.
    draw = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: leaf + 0.3 * draw.normal(size=leaf.shape), params)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    x = jnp.asarray(draw.normal(size=(BATCH, LENGTH, WIDTH)), jnp.float32)
    weights = jnp.asarray(draw.normal(size=x.shape), jnp.float32)

    def results(call):
        def loss(params, x):
            y = call(nnx.merge(graph, params), x)
            return jnp.sum(weights * y), y

        (_, y), gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, x)
        return y, gradients

    ours = results(lambda block, x: block(x, None, None)[0])
    expected = results(by_hand)
    chex.assert_trees_all_equal_shapes_and_dtypes(ours, expected)
    for result, exact in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        assert jnp.linalg.norm(result - exact) <= limit * jnp.linalg.norm(exact)


@pytest.mark.parametrize("rate", [8 / 256, 0.5, 248 / 256])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dropout_keeps_the_right_share_and_scales_it(rate, dtype):
    x = jnp.asarray(np.random.default_rng(0).uniform(1, 2, (7, 101, 331)), dtype)
    found = dropout(x, rate, jax.random.key(0))
    chex.assert_trees_all_equal_shapes_and_dtypes(found, x)
    kept = np.asarray(found != 0)
    np.testing.assert_allclose(
        found[kept], x[kept] / (1 - rate), rtol=1e-2 if x.itemsize == 2 else 1e-4
    )
    # Five standard deviations, of all values and of each last axis' position.
    for share, count in ((kept.mean(), kept.size), (kept.mean(axis=(0, 1)), kept[..., 0].size)):
        assert (abs(share - (1 - rate)) <= 5 * np.sqrt(rate / count) + 1e-9).all()


def test_dropout_of_values_is_independent():
    """Neighbors, whose bits come from one word, and the rows of a batch."""
    kept = np.asarray(dropout(jnp.ones((8, 512, 64)), 0.3, jax.random.key(1)) != 0) - 0.7
    for shifted in (kept[..., 1:] * kept[..., :-1], kept[1:] * kept[:-1]):
        assert abs(shifted.mean()) < 5 * 0.21 / np.sqrt(shifted.size)


def test_dropout_without_a_key_or_a_rate_or_values_and_next_to_one():
    x = jnp.ones((2, 3))
    assert dropout(x, 0.5, None) is x
    assert dropout(x, 0.0, jax.random.key(0)) is x
    found = dropout(jnp.ones((64, 1024)), 1 - 2**-20, jax.random.key(0))
    assert abs(int((found != 0).sum()) - 256) < 5 * 16
    assert dropout(jnp.zeros((2, 0, 7)), 0.1, jax.random.key(0)).shape == (2, 0, 7)


SIZES = {"hidden_dim": 13, "key_dim": 6, "value_dim": 10, "output_dim": 7}


def cell_inputs():
    return jax.random.normal(jax.random.key(0), (BATCH, LENGTH, SIZES["hidden_dim"]))


@pytest.mark.parametrize(
    "options",
    [{}, {"num_heads": 2, "query_scale": 0.5, "output_norm": True, "output_gate": True}],
    ids=["bare", "extended"],
)
def test_layer_equals_the_cell_in_nnx_rnn(options):
    layer = SimpleRNN(**SIZES, **options, rngs=nnx.Rngs(0))
    x = cell_inputs()
    y, state = layer(x)
    carry, unrolled = nnx.RNN(layer.cell, return_carry=True)(x)
    chex.assert_shape(y, (BATCH, LENGTH, SIZES["output_dim"]))
    chex.assert_trees_all_close(y, unrolled, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(state, carry, rtol=1e-5, atol=1e-6)


def test_initial_state_is_float32_zeros_for_any_compute_dtype():
    cell = SimpleRNNCell(**SIZES, num_heads=2, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    state = cell.initial_state(BATCH)
    chex.assert_trees_all_equal(state, jnp.zeros((BATCH, 2, 3, 5), jnp.float32))
    carry, y = cell(state, cell_inputs()[:, 0])
    assert (carry.dtype, y.dtype) == (jnp.float32, jnp.float32)


def test_heads_must_divide_the_widths():
    with pytest.raises(ValueError, match="num_heads=3 must divide"):
        SimpleRNN(**SIZES, num_heads=3, rngs=nnx.Rngs(0))


GRADIENT = """
import hashlib, jax, numpy as np
from flax import nnx
from simplernn_jax.models import SimpleRNN

layer = SimpleRNN(128, 128, 128, 128, num_heads=2, rngs=nnx.Rngs(0))
x = jax.random.normal(jax.random.key(1), (16, 128, 128))
for grad in jax.tree.leaves(nnx.jit(nnx.grad(lambda layer, x: (layer(x)[0] ** 2).sum()))(layer, x)):
    print(grad.shape, hashlib.sha256(np.asarray(grad)).hexdigest())
"""


def test_the_number_of_threads_changes_no_bit_of_a_gradient():
    environment = {"XLA_FLAGS": "", "JAX_NUM_CPU_DEVICES": "1"}  # optimized code, not from a cache
    environment["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    one, two = (run_python("-c", GRADIENT, NPROC=n, **environment) for n in "12")
    assert one.output.count("(128,)") == 5, one.errors
    assert one.output == two.output
