"""The residual block: value and gradient against its equations, written out with JAX alone."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from simplernn_jax.config import ModelConfig
from simplernn_jax.models.blocks import ResidualBlock
from simplernn_jax.ops import gated_linear_recurrence

BATCH, LENGTH, WIDTH, HEADS = 2, 11, 14, 2


def block_of(precision):
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
    return ResidualBlock(config, "simple_rnn", rngs=nnx.Rngs(0))


def normalised(x):
    return x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)


def by_hand(block, x):
    """The equations of `ResidualBlock`, all in float32."""
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
    return x + linear(block.mlp_out, jax.nn.relu(linear(block.mlp_in, normalised(x))) ** 2)


# Operands of bfloat16 have 8 bits, and an entry is a sum of several roundings.
@pytest.mark.parametrize(("precision", "limit"), [("float32", 1e-5), ("bfloat16", 3e-2)])
def test_value_and_gradients(precision, limit):
    graph, params = nnx.split(block_of(precision))
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
