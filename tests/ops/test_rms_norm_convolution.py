"""The convolution of normalized inputs: the C functions and shifts, both against loops."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from meshes import mesh_of
from references import NATIVE, convolve_by_loops, needs_compiler

from simplernn_jax.ops.convolution import rms_norm_convolution
from simplernn_jax.ops.native import CONVOLUTION_FORWARD


def draw(batch, length, dim, width):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((batch, length, dim))
    weights = rng.standard_normal((width, dim))
    recent = rng.standard_normal((batch, width - 1, dim))
    starts = rng.random((batch, length)) < 0.2
    starts[:, :1] = False
    return tuple(jnp.asarray(each, jnp.float32) for each in (x, weights, recent)), jnp.asarray(
        starts
    )


@pytest.mark.parametrize("native", NATIVE)
@pytest.mark.parametrize(
    ("length", "with_starts"), [(1, False), (2, True), (23, False), (131, False), (131, True)]
)
def test_equals_the_equations(length, with_starts, native):
    inputs, starts = draw(3, length, 37, 4)
    starts = starts if with_starts else None
    ours = rms_norm_convolution(*inputs, starts, native=native)
    expected = convolve_by_loops(*(np.asarray(each, np.float64) for each in inputs), starts)
    chex.assert_trees_all_close(ours, expected, rtol=2e-5, atol=2e-6)


@functools.partial(jax.jit, static_argnames="native")
def gradients(inputs, starts, native):
    rng = np.random.default_rng(7)

    def total(inputs):
        y, final = rms_norm_convolution(*inputs, starts, native=native)
        return sum(jnp.sum(part * rng.standard_normal(part.shape)) for part in (y, final))

    return jax.grad(total)(inputs)


@needs_compiler
@pytest.mark.parametrize(
    ("length", "with_starts"), [(1, True), (2, False), (23, True), (260, False), (260, True)]
)
def test_native_gradients_equal_those_of_shifts(length, with_starts):
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
def test_inside_shard_map():
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

    data = P("data")
    sharded = jax.shard_map(
        on_mesh, mesh=mesh_of(data=4), in_specs=(data, P(), data, data), out_specs=P()
    )
    ours = jax.jit(jax.grad(sharded, argnums=(0, 1, 2)))(x, weights, recent, starts)
    expected = jax.grad(total, argnums=(0, 1, 2))(x, weights, recent, starts)
    chex.assert_trees_all_close(ours, expected, rtol=1e-5, atol=1e-4)


@needs_compiler
def test_is_deterministic():
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


@pytest.mark.parametrize("normalize", [True, False])
def test_results_have_the_dtype_of_the_state(normalize):
    recent = jnp.zeros((2, 3, 5), jnp.bfloat16)
    results = rms_norm_convolution(
        jnp.ones((2, 7, 5)), jnp.ones((4, 5)), recent, None, normalize=normalize
    )
    chex.assert_type(results, jnp.bfloat16)
