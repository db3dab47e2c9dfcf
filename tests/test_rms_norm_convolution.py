"""The convolution of normalised inputs: C functions against shifts, and both against loops."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from meshes import mesh_of

from simplernn_jax.ops.native import CONVOLUTION_FORWARD, has_native_functions
from simplernn_jax.ops.rms_norm import EPSILON
from simplernn_jax.ops.rms_norm_convolution import rms_norm_convolution

needs_compiler = pytest.mark.skipif(
    not has_native_functions(), reason="no C compiler: nothing is compiled"
)


def draw(batch, length, dim, width, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((batch, length, dim))
    weights = rng.standard_normal((width, dim))
    recent = rng.standard_normal((batch, width - 1, dim))
    starts = rng.random((batch, length)) < 0.2
    starts[:, :1] = False
    return tuple(jnp.asarray(each, dtype) for each in (x, weights, recent)), jnp.asarray(starts)


def by_loops(x, weights, recent, starts):
    normal = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + EPSILON)
    inputs = np.concatenate([recent, normal], axis=1)
    y, past = np.zeros(x.shape), recent.shape[1]
    for row in range(x.shape[0]):
        for t in range(x.shape[1]):
            for i in range(weights.shape[0]):
                if i and starts is not None and t - i + 1 >= 0 and starts[row, t - i + 1]:
                    break
                y[row, t] += weights[i] * inputs[row, past + t - i]
    return y, inputs[:, x.shape[1] :]


@pytest.mark.parametrize("native", [False, pytest.param(True, marks=needs_compiler)])
@pytest.mark.parametrize("length", [1, 2, 23, 131])
@pytest.mark.parametrize("with_starts", [False, True])
def test_is_what_the_equations_say(length, with_starts, native):
    inputs, starts = draw(3, length, 37, 4)
    starts = starts if with_starts else None
    ours = rms_norm_convolution(*inputs, starts, native=native)
    expected = by_loops(*(np.asarray(each, np.float64) for each in inputs), starts)
    chex.assert_trees_all_close(ours, expected, rtol=2e-5, atol=2e-6)


def gradients(inputs, starts, native):
    rng = np.random.default_rng(7)

    def total(inputs):
        y, final = rms_norm_convolution(*inputs, starts, native=native)
        return sum(jnp.sum(part * rng.standard_normal(part.shape)) for part in (y, final))

    return jax.grad(total)(inputs)


@needs_compiler
@pytest.mark.parametrize("length", [1, 2, 23, 131, 260])
@pytest.mark.parametrize("with_starts", [False, True])
def test_gradients_of_the_c_functions_are_those_of_shifts(length, with_starts):
    inputs, starts = draw(3, length, 37, 4)
    starts = starts if with_starts else None
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda each: jnp.asarray(each, jnp.float64), inputs)
        expected = gradients(wide, starts, native=False)
    # Sums over up to 780 tokens in float32.
    chex.assert_trees_all_close(
        gradients(inputs, starts, native=True),
        jax.tree.map(np.float32, expected),
        rtol=2e-5,
        atol=3e-5,
    )


@needs_compiler
def test_a_mesh_and_one_thread_more_or_less_change_nothing():
    (x, weights, recent), starts = draw(8, 521, 64, 4)
    assert (
        CONVOLUTION_FORWARD
        in jax.jit(rms_norm_convolution).lower(x, weights, recent, starts).as_text()
    )

    def total(x, weights, recent, starts):
        y, final = rms_norm_convolution(x, weights, recent, starts)
        return jnp.sum(jnp.sin(y)) + jnp.sum(final)

    def on_mesh(*inputs):
        return jax.lax.psum(total(*inputs), "data")

    rows = P("data")
    sharded = jax.shard_map(
        on_mesh, mesh=mesh_of(data=4), in_specs=(rows, P(), rows, rows), out_specs=P()
    )
    ours = jax.jit(jax.grad(sharded, argnums=(0, 1, 2)))(x, weights, recent, starts)
    expected = jax.grad(total, argnums=(0, 1, 2))(x, weights, recent, starts)
    chex.assert_trees_all_close(ours, expected, rtol=1e-5, atol=1e-4)


@needs_compiler
def test_the_same_input_gives_the_same_bytes():
    inputs, starts = draw(16, 260, 64, 4)
    first = gradients(inputs, starts, native=True)
    for _ in range(3):
        chex.assert_trees_all_equal(gradients(inputs, starts, native=True), first)


@needs_compiler
def test_vmap():
    (x, weights, recent), starts = draw(6, 5, 7, 3)
    split = [each.reshape(2, 3, *each.shape[1:]) for each in (x, recent, starts)]
    ours = jax.vmap(rms_norm_convolution, (0, None, 0, 0))(split[0], weights, *split[1:])
    expected = rms_norm_convolution(x, weights, recent, starts)
    chex.assert_trees_all_close(
        jax.tree.map(lambda each: each.reshape(6, *each.shape[2:]), ours), expected, rtol=1e-6
    )


def test_no_tokens():
    (x, weights, recent), starts = draw(3, 0, 7, 4)
    y, final = rms_norm_convolution(x, weights, recent, starts)
    chex.assert_shape(y, (3, 0, 7))
    chex.assert_trees_all_equal(final, recent)
