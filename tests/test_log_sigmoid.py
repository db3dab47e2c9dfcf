"""The logarithm of a forget gate: values and gradients against float64, far out and near zero."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simplernn_jax.ops.log_sigmoid import log_sigmoid

LARGEST = float(np.finfo(np.float32).max)
LOGITS = np.concatenate([np.linspace(-100, 80, 7919), [-LARGEST, -1e-30, 0, 1e-30, LARGEST]])


def exact(x):
    """Value and gradient in float64."""
    x = np.asarray(x, np.float64)
    return -np.logaddexp(0, -x), np.exp(-np.logaddexp(0, x))


@pytest.mark.parametrize(("dtype", "limit"), [(np.float32, 5e-7), (np.float64, 1e-14)])
def test_value_and_gradient(dtype, limit):
    with jax.enable_x64(dtype == np.float64):
        x = jnp.asarray(LOGITS, dtype)
        y, pullback = jax.vjp(jax.jit(log_sigmoid), x)
        (gradient,) = pullback(jnp.full_like(x, 3))
        assert y.dtype == gradient.dtype == dtype
        value, slope = exact(x)
        # Below the smallest normal number a float32 has no relative accuracy left.
        chex.assert_trees_all_close(np.asarray(y, np.float64), value, rtol=limit, atol=1e-37)
        chex.assert_trees_all_close(
            np.asarray(gradient, np.float64), 3 * slope, rtol=limit, atol=1e-37
        )


def test_any_shape():
    x = jnp.asarray(np.linspace(-3, 3, 2 * 3 * 5), jnp.float32).reshape(2, 3, 5)
    value, slope = exact(x)
    chex.assert_trees_all_close(log_sigmoid(x), value, rtol=1e-6)
    chex.assert_trees_all_close(jax.grad(lambda x: log_sigmoid(x).sum())(x), slope, rtol=1e-6)
