"""The cell as a Flax RNN cell, and the layer over time."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from processes import run_python

from simplernn_jax.models import SimpleRNN, SimpleRNNCell

SIZES = {"hidden_dim": 13, "key_dim": 6, "value_dim": 10, "output_dim": 7}
BATCH, LENGTH = 3, 11


def inputs():
    return jax.random.normal(jax.random.key(0), (BATCH, LENGTH, SIZES["hidden_dim"]))


def one_token_by_hand(cell, x, state):
    """The equations of the PyTorch cell for one row, in numpy float64."""

    def linear(layer):
        return np.asarray(x, np.float64) @ np.asarray(layer.kernel[...], np.float64) + np.asarray(
            layer.bias[...], np.float64
        )

    def sigmoid(y):
        return 1 / (1 + np.exp(-y))

    gate, key = sigmoid(linear(cell.gate_proj)), sigmoid(linear(cell.key_proj))
    state = gate[:, None] * state + key[:, None] * linear(cell.value_proj)[None]
    y = state.T @ linear(cell.query_proj)
    out = y @ np.asarray(cell.out_proj.kernel[...], np.float64)
    return out + np.asarray(cell.out_proj.bias[...], np.float64), state


def test_one_head_is_the_cell_of_the_equations():
    layer = SimpleRNN(**SIZES, rngs=nnx.Rngs(0))
    x = inputs()
    y, final = layer(x)
    for row in range(BATCH):
        state = np.zeros((SIZES["key_dim"], SIZES["value_dim"]))
        for t in range(LENGTH):
            expected, state = one_token_by_hand(layer.cell, x[row, t], state)
            chex.assert_trees_all_close(y[row, t], expected, rtol=1e-4, atol=1e-6)
        chex.assert_trees_all_close(final[row, 0], state, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [{}, {"num_heads": 2, "query_scale": 0.5, "output_norm": True, "output_gate": True}],
    ids=["bare", "extended"],
)
def test_layer_equals_the_cell_in_nnx_rnn(options):
    layer = SimpleRNN(**SIZES, **options, rngs=nnx.Rngs(0))
    x = inputs()
    y, state = layer(x)
    carry, unrolled = nnx.RNN(layer.cell, return_carry=True)(x)
    chex.assert_shape(y, (BATCH, LENGTH, SIZES["output_dim"]))
    chex.assert_trees_all_close(y, unrolled, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(state, carry, rtol=1e-5, atol=1e-6)


def test_initial_state_is_float32_zeros_for_any_compute_dtype():
    cell = SimpleRNNCell(**SIZES, num_heads=2, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    state = cell.initial_state(BATCH)
    chex.assert_trees_all_equal(state, jnp.zeros((BATCH, 2, 3, 5), jnp.float32))
    carry, y = cell(state, inputs()[:, 0])
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
