"""Newton-Schulz iterations: the C function and XLA against float64, and their properties."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simplernn_jax.ops.native import has_fast_bfloat16, has_native_functions
from simplernn_jax.ops.newton_schulz import COEFFICIENTS, newton_schulz

SHAPES = [(7, 11), (67, 13), (2, 3, 5, 2), (1, 1), (131, 257), (131, 263)]
"""The last two have several tiles of both sides, none of them full at the end. The last and the
second are at least twice as long as wide."""


HAS_BFLOAT16 = has_fast_bfloat16()
"""With it, matrices have 8 bits in place of 24, and each iteration amplifies their rounding."""


def matrices_of(shapes, dtype=np.float32):
    random = np.random.default_rng(0)
    return [jnp.asarray(random.normal(size=shape), dtype) for shape in shapes]


def by_hand(matrix):
    x = np.asarray(matrix, np.float64)
    x = x / np.linalg.norm(x, axis=(-2, -1), keepdims=True)
    for a, b, c in COEFFICIENTS:
        product = x @ np.swapaxes(x, -1, -2)
        x = a * x + (b * product + c * product @ product) @ x
    return x


def test_c_function_and_xla_agree_with_float64():
    assert has_native_functions()
    matrices = matrices_of(SHAPES)
    in_c = jax.jit(newton_schulz)(matrices)
    exported = jax.export.export(jax.jit(newton_schulz))(matrices)  # has no custom calls
    in_xla = jax.jit(exported.call)(matrices)
    # At a singular value of 1, as of [1, 1], the first iteration is steep: it amplifies rounding.
    atols = (7e-2 if HAS_BFLOAT16 else 5e-6, 5e-6)
    for matrix, *results in zip(matrices, in_c, in_xla, strict=True):
        expected = by_hand(matrix)
        for result, atol in zip(results, atols, strict=True):
            chex.assert_shape(result, matrix.shape)
            np.testing.assert_allclose(result, expected, atol=atol)


@pytest.mark.parametrize("shape", [(37, 41), (37, 131), (131, 37), (301, 269)])
def test_weak_directions_are_those_of_float64(shape):
    """Where A alone is iterated, rounding limits the accuracy of directions below 1e-3."""
    left, _, right = np.linalg.svd(matrices_of([shape])[0], full_matrices=False)
    matrix = (left * np.logspace(0, -6, min(shape))) @ right
    (result,) = newton_schulz([jnp.asarray(matrix, jnp.float32)])
    np.testing.assert_allclose(result, by_hand(matrix), atol=2e-2 if HAS_BFLOAT16 else 2e-3)


def test_a_result_does_not_depend_on_the_other_matrices():
    first, second = matrices_of([(37, 41), (3, 19, 23)])
    both, alone = newton_schulz([first, second]), newton_schulz([second])
    np.testing.assert_array_equal(both[1], alone[0])
    np.testing.assert_array_equal(newton_schulz([second[1]])[0], alone[0][1])


def test_extreme_and_empty_matrices():
    for value in (0.0, 1e30, np.nan):
        (result,) = newton_schulz([jnp.full((5, 3), value, jnp.float32)])
        assert np.isfinite(result).all() == np.isfinite(value)
    assert newton_schulz([]) == []
    for shape in ((0, 3), (2, 3, 0)):
        chex.assert_shape(newton_schulz([jnp.zeros(shape)]), [shape])
