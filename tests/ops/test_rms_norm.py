"""RMS normalization: the C functions and the custom gradient against the formula."""

import functools

import chex
import jax
import jax.numpy as jnp
import pytest
from references import NATIVE

from simplernn_jax.ops.rms_norm import EPSILON, rms_norm


def plain(x, epsilon=EPSILON):
    return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + epsilon)


@functools.partial(jax.jit, static_argnums=0)
def results(norm, x):
    weights = jax.random.normal(jax.random.key(1), x.shape)
    return norm(x), jax.grad(lambda x: jnp.sum(jnp.sin(norm(x) * weights)))(x)


@pytest.mark.fewer_cases
@pytest.mark.parametrize("native", [*NATIVE, None])
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (3, 257, 37), (2, 3, 5, 32)])
def test_equals_the_formula(shape, native):
    with jax.enable_x64(native is None):
        x = jax.random.normal(jax.random.key(0), shape)  # float64 or float32
        ours = results(lambda x: rms_norm(x, native=native), x)
        # The gradient of one channel is a difference of two numbers that are almost equal.
        float64, float32 = {"rtol": 1e-11, "atol": 1e-14}, {"rtol": 1e-5, "atol": 1e-6}
        tolerance = float64 if native is None else float32
        chex.assert_trees_all_close(ours, results(plain, x), **tolerance)


@pytest.mark.parametrize("native", NATIVE)
@pytest.mark.parametrize("epsilon", [1e-8, 1e-5, 1.0])
def test_another_epsilon(epsilon, native):
    x = 1e-3 * jax.random.normal(jax.random.key(0), (5, 7))  # squares of about 1e-6
    ours = results(lambda x: rms_norm(x, epsilon=epsilon, native=native), x)
    expected = results(functools.partial(plain, epsilon=epsilon), x)
    chex.assert_trees_all_close(ours, expected, rtol=1e-5, atol=1e-5 * jnp.abs(expected[1]).max())


@pytest.mark.parametrize("native", NATIVE)
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e30])
def test_extreme_inputs_give_finite_results(size, native):
    x = jnp.full((3, 5), size, jnp.float32)
    y, back = jax.vjp(lambda x: rms_norm(x, native=native), x)
    chex.assert_tree_all_finite((y, back(jnp.ones_like(y))))


def test_dtypes_for_bfloat16():
    x = jax.random.normal(jax.random.key(0), (5, 7), jnp.bfloat16)
    y, back = jax.vjp(rms_norm, x)
    assert y.dtype == jnp.float32
    assert back(y)[0].dtype == jnp.bfloat16


def test_vmap_and_empty_batch():
    x = jax.random.normal(jax.random.key(0), (5, 3, 7))
    chex.assert_trees_all_close(jax.vmap(rms_norm)(x), rms_norm(x), rtol=1e-6)
    chex.assert_shape(rms_norm(x[:0]), (0, 3, 7))
