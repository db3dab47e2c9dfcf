"""Matmul of a dense layer and its gradient: operands in one dtype, sums in float32.

On one device tokens are flattened, so that the gradient of a kernel contracts one axis. XLA's CPU
backend has a fast matmul for row-major ``[m, k] [k, n]`` only: the gradient of a kernel, x^T g,
contracts the leading axis of both and takes up to twice as long, and in bfloat16 any transposed
operand loses the speedup (measured with 4,096 tokens, 128 to 512 and back). So the gradient first
transposes the smaller operand, in a way that XLA does not fold into the matmul.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from simplernn_jax.ops.checks import FLOATING, accumulator_dtype, check_array, check_dtype
from simplernn_jax.ops.forms import Forms, Gradient
from simplernn_jax.ops.operation import apply, on_one_device


def matmul(x: jax.Array, kernel: jax.Array, dtype: Any) -> jax.Array:
    """Multiply ``[..., in] [in, out]``: operands in `dtype`, result at least float32."""
    return fused_matmul(x, (kernel,), dtype)[0]


def fused_matmul(x: jax.Array, kernels: Sequence[jax.Array], dtype: Any) -> tuple[jax.Array, ...]:
    """Compute `matmul` of `x` with each kernel ``[in, out]``, as one matmul.

    Raises:
      ValueError: no kernel, wrong ranks, or shapes that do not fit together.
      TypeError: wrong dtypes.
    """
    if not kernels:
        raise ValueError("kernels: expected at least one; got none")
    sizes = check_array("x", x, "... in")
    for kernel in kernels:
        check_array("kernel", kernel, "in out", FLOATING, {"in": sizes["in"]})
    check_dtype("dtype", dtype)
    x, *kernels = map(jnp.asarray, (x, *kernels))  # float64 of NumPy may be float32 here
    widths = tuple(kernel.shape[1] for kernel in kernels)
    result = accumulator_dtype(dtype)
    results = [jax.ShapeDtypeStruct((*x.shape[:-1], width), result) for width in widths]
    forward, gradient = _operation(jnp.dtype(dtype), x.dtype, widths, on_one_device())
    if x.dtype != dtype:
        extras = ((x.shape, jnp.dtype(dtype)),)
        gradient = dataclasses.replace(gradient, extras=extras)
    return tuple(apply(forward, [*kernels, x], results, gradient))


def merge_tokens(x: jax.Array) -> jax.Array:
    """Merge all axes but the last, unless XLA may have to partition them.

    It saves memory between two matmuls: XLA then keeps one layout of the activations.
    """
    return _merged(x) if on_one_device() else x


def _merged(x: jax.Array) -> jax.Array:
    # Not -1, which is ambiguous for an empty array.
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


@functools.cache
def _operation(
    dtype: Any, x_dtype: Any, widths: tuple[int, ...], one_device: bool
) -> tuple[Forms, Gradient]:
    """Make `fused_matmul` of (kernels, x); residuals are the kernels and x in `dtype`."""
    count = len(widths)

    def flat(x: jax.Array) -> jax.Array:
        return _merged(x) if one_device else x

    def forward(how: _Matmul, *args: jax.Array) -> Sequence[jax.Array]:
        *kernels, x = args
        y = _dot(how, flat(x.astype(dtype)), how.concatenate(kernels, dtype))
        return _split(y.reshape(*x.shape[:-1], y.shape[-1]), widths)

    def with_rounded(how: _Matmul, *args: jax.Array) -> Sequence[jax.Array]:
        return *forward(how, *args), args[-1].astype(dtype)

    def backward(how: _Matmul, *args: jax.Array) -> Sequence[jax.Array]:
        kernels, (low, *cotangents) = args[:count], args[count:]
        shape, low = low.shape, flat(low)
        d_y = flat(how.concatenate(cotangents, dtype))
        d_x = _dot(how, d_y, how.operand(how.concatenate(kernels, dtype)).T)
        d_kernels = _split(how.kernel_gradient(low, d_y), widths)
        d_x = d_x.astype(x_dtype).reshape(shape)
        return *(d.astype(k.dtype) for d, k in zip(d_kernels, kernels, strict=True)), d_x

    def widened(*residuals: jax.Array) -> Sequence[jax.Array]:
        return *residuals[:-1], residuals[-1].astype(x_dtype)

    def forms(function: Callable[..., Sequence[jax.Array]]) -> Forms:
        on_cpu = _ROW_MAJOR if one_device else _WIDENED
        # XLA's CPU backend aborts where a batched matmul has a constrained layout (jax 0.10).
        return Forms(
            partial(function, _PLAIN),
            partial(function, on_cpu),
            partial(function, _WIDENED),
            vmaps_cpu=not one_device,
        )

    if dtype == x_dtype:
        return forms(forward), Gradient(forms(backward))
    # The rounded x is half as large.
    kept = tuple(range(count))
    return forms(forward), Gradient(forms(backward), forms(with_rounded), kept=kept, inputs=widened)


class _Matmul(NamedTuple):
    """Parts of the matmul that XLA's CPU backend needs in another form."""

    operand: Callable[[jax.Array], jax.Array]
    """Prepares an operand."""
    concatenate: Callable[[Sequence[jax.Array], Any], jax.Array]
    """Concatenates arrays along the last axis, in a dtype."""
    kernel_gradient: Callable[[jax.Array, jax.Array], jax.Array]
    """Computes the gradient of the kernels from x and the cotangent of the result."""


def _concatenated(arrays: Sequence[jax.Array], dtype: Any) -> jax.Array:
    low = [array.astype(dtype) for array in arrays]
    return low[0] if len(low) == 1 else jnp.concatenate(low, axis=-1)


def _concatenated_as_bits(arrays: Sequence[jax.Array], dtype: Any) -> jax.Array:
    """XLA's CPU backend concatenates bfloat16 in float32, but not integers."""
    if dtype != jnp.bfloat16 or len(arrays) == 1:
        return _concatenated(arrays, dtype)
    bits = [jax.lax.bitcast_convert_type(array.astype(dtype), jnp.uint16) for array in arrays]
    return jax.lax.bitcast_convert_type(jnp.concatenate(bits, axis=-1), jnp.bfloat16)


def _row_major(x: jax.Array) -> jax.Array:
    """Constrain the layout, so that XLA materializes a transposed `x`."""
    return with_layout_constraint(x, Layout((0, 1)))


def _contract(low: jax.Array, d_y: jax.Array) -> jax.Array:
    axes = tuple(range(low.ndim - 1))
    return jnp.tensordot(low, d_y, (axes, axes), preferred_element_type=_accumulator_dtype(low))


def _contract_row_major(low: jax.Array, d_y: jax.Array) -> jax.Array:
    swap = low.shape[1] > d_y.shape[1]
    smaller, other = (d_y, low) if swap else (low, d_y)
    d_kernel = _dot(_ROW_MAJOR, _row_major(smaller).T, other)
    # The barrier keeps the transpose of this small result out of the matmul.
    d_kernel = jax.lax.optimization_barrier(d_kernel)
    return d_kernel.T if swap else d_kernel


def _widened(x: jax.Array) -> jax.Array:
    return x.astype(_accumulator_dtype(x))


_PLAIN = _Matmul(lambda x: x, _concatenated, _contract)
_ROW_MAJOR = _Matmul(_row_major, _concatenated_as_bits, _contract_row_major)
_WIDENED = _Matmul(_widened, _concatenated, lambda *pair: _contract(*map(_widened, pair)))
"""Operands in float32, with the same results: XLA's CPU backend cannot multiply bfloat16 in every
layout that it may choose."""


def _split(y: jax.Array, widths: Sequence[int]) -> Sequence[jax.Array]:
    ends = itertools.accumulate(widths)
    return [y[..., end - width : end] for end, width in zip(ends, widths, strict=True)]


def _dot(how: _Matmul, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.dot(how.operand(a), how.operand(b), preferred_element_type=_accumulator_dtype(a))


def _accumulator_dtype(x: jax.Array) -> Any:
    return accumulator_dtype(x)
