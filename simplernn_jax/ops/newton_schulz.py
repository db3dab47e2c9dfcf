"""Approximate orthogonal polar factors of matrices, by Newton-Schulz iterations."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from simplernn_jax.ops.checks import accumulator_dtype, check_array
from simplernn_jax.ops.native import call_native, supports_native
from simplernn_jax.ops.primitive import Operation, is_static

COEFFICIENTS = ((7.7080, -20.4042, 13.6695), (3.4634, -2.3513, 0.4204), (2.6613, -1.9772, 0.4526))
"""Factors of x, x x^T x and (x x^T)^2 x in each iteration. They map singular values from 0.01 to
1.05 closest to 1 (Polar Express, arXiv:2505.16932, with a factor of 1.05 for rounding)."""


def newton_schulz(matrices: Sequence[jax.Array]) -> list[jax.Array]:
    """Return the approximate orthogonal polar factor of each matrix, ``[..., m, n]`` float32.

    Singular values become 0.7 to 1.3, except those below 0.01 of the norm. Each iteration is ``X
    <- (a + b X X^T + c (X X^T)^2) X``, in the smaller dimension. On a CPU, one C function computes
    all matrices; where the processor multiplies bfloat16 fast, they are rounded to it.
    """
    for matrix in matrices:
        check_array("matrix", matrix, "... m n")
    matrices = [jnp.asarray(matrix, accumulator_dtype(matrix)) for matrix in matrices]
    has_c = all(
        supports_native(matrix.dtype) and is_static(matrix.shape) and matrix.size
        for matrix in matrices
    )
    return Operation(_all, _all_in_c if has_c else None)(*matrices) if matrices else []


def _all(*matrices: jax.Array) -> list[jax.Array]:
    return [_polar_factor(matrix) for matrix in matrices]


def _all_in_c(*matrices: jax.Array) -> Sequence[jax.Array]:
    return call_native("simplernn_newton_schulz", matrices, *matrices)


@jax.jit  # traced and lowered once for all matrices of a shape
def _polar_factor(matrix: jax.Array) -> jax.Array:
    if not matrix.size:
        return matrix
    if matrix.ndim > 2:
        flat = matrix.reshape(math.prod(matrix.shape[:-2]), *matrix.shape[-2:])
        # One after the other: XLA's CPU backend takes 2.5 times as long for batched matmuls.
        return jnp.stack([_polar_factor(each) for each in flat]).reshape(matrix.shape)
    rows, columns = matrix.shape
    x = matrix.T if rows > columns else matrix
    x = x / (jnp.linalg.norm(x) + 1e-8)
    for a, b, c in COEFFICIENTS:
        gram = x @ x.T
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.T if rows > columns else x
