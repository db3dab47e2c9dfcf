"""Newton-Schulz iterations: the C function and XLA against float64, and their properties."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simplernn_jax.ops.native import has_native_functions
from simplernn_jax.ops.newton_schulz import COEFFICIENTS, newton_schulz

SHAPES = [(7, 11), (67, 13), (2, 3, 5, 2), (1, 1), (131, 257)]
"""The last has several tiles of both sides, none of them full at the end."""


def matrices_of(shapes, dtype=np.float32):
    random = np.random.default_rng(0)
    return [jnp.asarray(random.normal(size=shape), dtype) for shape in shapes]


def to_bfloat16(x):
    return x.astype(np.float32).astype(jnp.bfloat16).astype(np.float64)


def by_hand(matrix, operand=to_bfloat16):
    x = np.asarray(matrix, np.float64)
    if x.shape[-2] > x.shape[-1]:
        return by_hand(x.swapaxes(-1, -2), operand).swapaxes(-1, -2)
    x = x / np.linalg.norm(x, axis=(-2, -1), keepdims=True)
    a, b, c = COEFFICIENTS
    for _ in range(5):
        low_x = operand(x)
        product = low_x @ low_x.swapaxes(-1, -2)
        low = operand(product)
        x = a * x + operand(b * product + c * low @ low) @ low_x
    return x


def relative_error(actual, expected):
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


def test_c_function_and_xla_agree_with_float64():
    assert has_native_functions()
    matrices = matrices_of(SHAPES)
    in_c = jax.jit(newton_schulz)(matrices)
    exported = jax.export.export(jax.jit(newton_schulz))(matrices)  # has no custom calls
    in_xla = jax.jit(exported.call)(matrices)
    for matrix, *results in zip(matrices, in_c, in_xla, strict=True):
        expected = by_hand(matrix)
        for result in results:
            chex.assert_shape(result, matrix.shape)
            # Sums in another order round some operands to the neighboring number of 8 bits.
            assert relative_error(result, expected) < 2e-2


@pytest.mark.parametrize("shape", [(67, 13), (2, 3, 5, 2), (131, 257)])
def test_sums_of_one_product_agree_closely(shape):
    """One nonzero entry per row and column: the order of sums does not matter."""
    rows, columns = shape[-2:]
    matrix = np.zeros(shape, np.float32)
    matrix[..., np.arange(min(rows, columns)), -1 - np.arange(min(rows, columns))] = 4.0
    (result,) = newton_schulz([jnp.asarray(matrix)])
    np.testing.assert_allclose(result, by_hand(matrix), atol=2e-5)


def test_float64_is_not_rounded():
    with jax.enable_x64(True):
        matrices = matrices_of(SHAPES, np.float64)
        for matrix, result in zip(matrices, newton_schulz(matrices), strict=True):
            assert relative_error(result, by_hand(matrix, lambda x: x)) < 1e-6


def test_directions_stay_and_strengths_become_alike():
    left, _, right = np.linalg.svd(matrices_of([(17, 29)])[0], full_matrices=False)
    matrix = jnp.asarray((left * np.logspace(0, -1.5, 17)) @ right, jnp.float32)
    (result,) = newton_schulz([matrix])
    core = left.T @ result @ right.T
    # Entries of bfloat16 operands are off by up to a 256th.
    np.testing.assert_allclose(core, np.diag(np.diag(core)), atol=2e-2)
    assert np.diag(core).min() > 0.6
    assert np.diag(core).max() < 1.3


def test_a_result_does_not_depend_on_the_other_matrices():
    first, second = matrices_of([(37, 41), (3, 19, 23)])
    both, alone = newton_schulz([first, second]), newton_schulz([second])
    np.testing.assert_array_equal(both[1], alone[0])
    np.testing.assert_array_equal(newton_schulz([second[1]])[0], alone[0][1])


@pytest.mark.parametrize("value", [0.0, 1e30, np.nan, np.inf])
def test_extreme_matrices(value):
    (result,) = newton_schulz([jnp.full((5, 3), value, jnp.float32)])
    chex.assert_shape(result, (5, 3))
    assert np.isfinite(result).all() == np.isfinite(value)


def test_empty_matrices_and_no_matrix():
    assert newton_schulz([]) == []
    (result,) = newton_schulz([jnp.zeros((0, 3))])
    chex.assert_shape(result, (0, 3))


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="matrix"):
        newton_schulz([jnp.zeros(3)])
    with pytest.raises(TypeError, match="matrix"):
        newton_schulz([jnp.zeros((3, 2), jnp.int32)])
