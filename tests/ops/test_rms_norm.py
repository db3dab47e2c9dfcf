"""RMS norm and the convolution of its results: the C functions, and XLA's, against the formulas."""

import functools
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from references import NATIVE, convolve_by_loops, needs_compiler
from small_runs import mesh_of

from simplernn_jax.ops import rms_norm as module
from simplernn_jax.ops.native import has_native_functions
from simplernn_jax.ops.rms_norm import EPSILON, gated_rms_norm, rms_norm, rms_norm_convolution


def in_c(function, native):
    """Call the C functions, or XLA's if `native` is False, for arrays of any size."""
    assert has_native_functions() or not native

    def run(*args, **options):
        with mock.patch.object(module, "use_native", return_value=native):
            return function(*args, **options)

    return run


def plain(x, epsilon=EPSILON):
    return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + epsilon)


@functools.partial(jax.jit, static_argnums=0)
def norm_and_gradient(norm, x):
    weights = jax.random.normal(jax.random.key(1), x.shape)
    return norm(x), jax.grad(lambda x: jnp.sum(jnp.sin(norm(x) * weights)))(x)


@pytest.mark.parametrize("native", [*NATIVE, None])
@pytest.mark.parametrize("shape", [(1, 1), (3, 257, 37), (2, 3, 5, 32)])
def test_norm_equals_the_formula(shape, native):
    with jax.enable_x64(native is None):
        x = jax.random.normal(jax.random.key(0), shape)  # float64 or float32
        ours = norm_and_gradient(in_c(rms_norm, bool(native)), x)
        # The gradient of one channel is a difference of two numbers that are almost equal.
        float64, float32 = {"rtol": 1e-11, "atol": 1e-14}, {"rtol": 1e-5, "atol": 1e-6}
        tolerance = float64 if native is None else float32
        chex.assert_trees_all_close(ours, norm_and_gradient(plain, x), **tolerance)


@pytest.mark.parametrize("native", NATIVE)
def test_another_epsilon_and_extreme_inputs(native):
    x = 1e-3 * jax.random.normal(jax.random.key(0), (5, 7))  # squares of about 1e-6
    for epsilon in (1e-8, 1.0):
        ours = norm_and_gradient(in_c(functools.partial(rms_norm, epsilon=epsilon), native), x)
        expected = norm_and_gradient(functools.partial(plain, epsilon=epsilon), x)
        largest = jnp.abs(expected[1]).max()
        chex.assert_trees_all_close(ours, expected, rtol=1e-5, atol=1e-5 * largest)
    for size in (0.0, 1e-30, 1e30):
        y, back = jax.vjp(in_c(rms_norm, native), jnp.full((3, 5), size, jnp.float32))
        chex.assert_tree_all_finite((y, back(jnp.ones_like(y))))


def test_norm_of_bfloat16_under_vmap_and_of_an_empty_batch():
    x = jax.random.normal(jax.random.key(0), (5, 3, 7), jnp.bfloat16)
    y, back = jax.vjp(rms_norm, x)
    assert (y.dtype, back(y)[0].dtype) == (jnp.float32, jnp.bfloat16)
    chex.assert_trees_all_close(jax.vmap(rms_norm)(x), y, rtol=1e-6)
    chex.assert_shape(rms_norm(x[:0]), (0, 3, 7))


@pytest.mark.parametrize("native", NATIVE)
@pytest.mark.parametrize("shape", [(1, 1), (3, 257, 37), (2, 3, 5, 32)])
def test_gated_norm_equals_the_formula_in_float64(shape, native):
    rng = np.random.default_rng(0)
    x, gate, d_y = (rng.normal(size=shape) * size for size in (1, 5, 1))

    def results(function, dtype):
        inputs = [jnp.asarray(each, dtype) for each in (x, gate)]
        y, back = jax.vjp(function, *inputs)
        return y, *back(jnp.asarray(d_y, dtype))

    ours = results(in_c(gated_rms_norm, native), jnp.float32)
    with jax.enable_x64(True):
        expected = results(lambda x, gate: plain(x) * jax.nn.silu(gate), jnp.float64)
        for result, exact in zip(ours, expected, strict=True):
            exact = np.asarray(exact)
            assert np.abs(np.asarray(result) - exact).max() <= 1e-5 * np.abs(exact).max() + 1e-6


def draw(batch, length, dim, width):
    rng = np.random.default_rng(0)
    shapes = ((batch, length, dim), (width, dim), (batch, width - 1, dim))
    inputs = tuple(jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)
    starts = rng.random((batch, length)) < 0.2
    starts[:, :1] = False
    return inputs, jnp.asarray(starts)


@pytest.mark.parametrize("native", NATIVE)
@pytest.mark.parametrize(("length", "with_starts"), [(1, False), (2, True), (131, True)])
def test_convolution_equals_the_equations(length, with_starts, native):
    inputs, starts = draw(3, length, 37, 4)
    starts = starts if with_starts else None
    ours = in_c(rms_norm_convolution, native)(*inputs, starts)
    expected = convolve_by_loops(*(np.asarray(each, np.float64) for each in inputs), starts)
    chex.assert_trees_all_close(ours, expected, rtol=2e-5, atol=2e-6)


@functools.partial(jax.jit, static_argnames="native")
def gradients(inputs, starts, native):
    rng = np.random.default_rng(7)

    def total(inputs):
        y, final = in_c(rms_norm_convolution, native)(*inputs, starts)
        return sum(jnp.sum(part * rng.standard_normal(part.shape)) for part in (y, final))

    return jax.grad(total)(inputs)


@needs_compiler
@pytest.mark.parametrize(("length", "with_starts"), [(1, True), (23, False), (260, True)])
def test_native_gradients_equal_those_in_float64(length, with_starts):
    inputs, starts = draw(3, length, 37, 4)
    starts = starts if with_starts else None
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda each: jnp.asarray(each, jnp.float64), inputs)
        expected = jax.tree.map(np.float32, gradients(wide, starts, native=False))
    ours = gradients(inputs, starts, native=True)
    # Sums over up to 780 tokens in float32.
    chex.assert_trees_all_close(ours, expected, rtol=2e-5, atol=3e-5)
    chex.assert_trees_all_equal(gradients(inputs, starts, native=True), ours)  # deterministic


@needs_compiler
def test_inside_shard_map():
    (x, weights, recent), starts = draw(8, 521, 64, 4)

    def total(x, weights, recent, starts):
        y, final = rms_norm_convolution(x, weights, recent, starts)
        return jnp.sum(jnp.sin(y)) + jnp.sum(final)

    def on_mesh(*inputs):
        return jax.lax.psum(total(*inputs), "data")

    data = P("data")
    sharded = jax.shard_map(
        on_mesh, mesh=mesh_of(data=4), in_specs=(data, P(), data, data), out_specs=P()
    )
    run = jax.jit(jax.grad(sharded, argnums=(0, 1, 2))).lower(x, weights, recent, starts)
    assert "simplernn_convolution_forward" in run.as_text()
    ours = run.compile()(x, weights, recent, starts)
    expected = jax.grad(total, argnums=(0, 1, 2))(x, weights, recent, starts)
    chex.assert_trees_all_close(ours, expected, rtol=1e-5, atol=1e-4)


@needs_compiler
def test_vmap_of_the_convolution():
    (x, weights, recent), starts = draw(6, 5, 7, 3)
    split = [each.reshape(2, 3, *each.shape[1:]) for each in (x, recent, starts)]
    run = in_c(rms_norm_convolution, True)
    ours = jax.vmap(run, (0, None, 0, 0))(split[0], weights, *split[1:])
    ours = jax.tree.map(lambda each: each.reshape(6, *each.shape[2:]), ours)
    chex.assert_trees_all_close(ours, run(x, weights, recent, starts), rtol=1e-6)


@pytest.mark.parametrize("normalize", [True, False])
def test_results_have_the_dtype_of_the_state(normalize):
    recent = jnp.zeros((2, 3, 5), jnp.bfloat16)
    results = rms_norm_convolution(
        jnp.ones((2, 7, 5)), jnp.ones((4, 5)), recent, None, normalize=normalize
    )
    chex.assert_type(results, jnp.bfloat16)
