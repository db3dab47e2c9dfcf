"""Matmul of a dense layer and its gradient: operands in one dtype, sums in float32.

On one device tokens are flattened, so that the gradient of a kernel contracts one axis. XLA's CPU
backend has a fast matmul for row-major ``[m, k] [k, n]`` only: the gradient of a kernel, x^T g,
contracts the leading axis of both and takes up to twice as long, and in bfloat16 any transposed
operand loses the speedup (measured: ``[4096, 128] [128, 512]`` and its transpose). So the gradient
first transposes the smaller operand, in a way that XLA does not fold into the matmul. Where the
processor multiplies bfloat16 no faster than float32, rounded operands are multiplied as float32.
"""

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
from simplernn_jax.ops.native import has_fast_bfloat16
from simplernn_jax.ops.primitive import Operation, on_one_device


def fused_matmul(x: jax.Array, kernels: Sequence[jax.Array], dtype: Any) -> tuple[jax.Array, ...]:
    """Compute `x` ``[..., in]`` times each kernel ``[in, out]``, as one matmul of `dtype` operands.

    Results are ``[..., out]``, float32 (float64 if `dtype` is).
    """
    if not kernels:
        raise ValueError("kernels: expected at least one; got none")
    sizes = check_array("x", x, "... in")
    for kernel in kernels:
        check_array("kernel", kernel, "in out", FLOATING, {"in": sizes["in"]})
    check_dtype("dtype", dtype)
    x, *kernels = map(jnp.asarray, (x, *kernels))  # without x64, float64 becomes float32
    widths = tuple(kernel.shape[1] for kernel in kernels)
    operation = _operation(jnp.dtype(dtype), x.dtype, widths, on_one_device(), has_fast_bfloat16())
    return tuple(operation(*kernels, x))


def merge_tokens(x: jax.Array) -> jax.Array:
    """Return ``[tokens, D]`` if the program runs on one device, else `x` ``[..., D]`` unchanged.

    It saves memory: XLA then keeps one layout of the activations between two matmuls.
    """
    return _merged(x) if on_one_device() else x


def _merged(x: jax.Array) -> jax.Array:
    # Not -1, which is ambiguous for an empty array.
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


@functools.cache
def _operation(
    dtype: Any, x_dtype: Any, widths: tuple[int, ...], one_device: bool, fast_bfloat16: bool
) -> Operation:
    """Build the operation (*kernels, x) to outputs; the gradient reads x in `dtype`."""
    # XLA's CPU backend cannot multiply bfloat16 in every layout that it may choose.
    reference = on_cpu = _Backend(upcast=True)
    if one_device:
        on_cpu = _Backend(row_major=True, upcast=dtype == jnp.bfloat16 and not fast_bfloat16)
    count = len(widths)

    def flat(x: jax.Array) -> jax.Array:
        return _merged(x) if one_device else x

    def default(backend: _Backend, *args: jax.Array) -> Sequence[jax.Array]:
        *kernels, x = args
        y = backend.dot(flat(x.astype(dtype)), backend.concatenate(kernels, dtype))
        return _split(y.reshape(*x.shape[:-1], y.shape[-1]), widths)

    def fwd(backend: _Backend, *args: jax.Array) -> Sequence[jax.Array]:
        return *default(backend, *args), args[-1].astype(dtype)

    def bwd(backend: _Backend, *args: jax.Array) -> Sequence[jax.Array]:
        kernels, x, cotangents = args[:count], args[-count - 1], args[-count:]
        shape, x = x.shape, flat(x)
        d_y = flat(backend.concatenate(cotangents, dtype))
        d_x = backend.dot(d_y, backend.operand(backend.concatenate(kernels, dtype)).T)
        d_kernels = _split(backend.kernel_gradient(x, d_y), widths)
        d_x = d_x.astype(x_dtype).reshape(shape)
        return *(d.astype(k.dtype) for d, k in zip(d_kernels, kernels, strict=True)), d_x

    def operation(function: Callable[..., Sequence[jax.Array]], **derivatives: Any) -> Operation:
        return Operation(
            partial(function, _Backend()),
            partial(function, on_cpu),
            partial(function, reference),
            # XLA's CPU backend aborts where a batched matmul has a constrained layout (jax 0.10).
            cpu_supports_vmap=not one_device,
            **derivatives,
        )

    # The rounded x is half as large as x.
    return operation(default, fwd=None if dtype == x_dtype else operation(fwd), bwd=operation(bwd))


class _Backend(NamedTuple):
    """How a backend multiplies."""

    row_major: bool = False
    """Constrain layouts, so that XLA materializes transposed operands."""
    upcast: bool = False
    """Multiply in float32, with the same results."""

    def operand(self, x: jax.Array) -> jax.Array:
        """Prepare an operand."""
        if self.upcast:
            x = x.astype(accumulator_dtype(x))
        return with_layout_constraint(x, Layout((0, 1))) if self.row_major else x

    def dot(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """Multiply matrices."""
        a, b = self.operand(a), self.operand(b)
        return jnp.dot(a, b, preferred_element_type=accumulator_dtype(a))

    def concatenate(self, arrays: Sequence[jax.Array], dtype: Any) -> jax.Array:
        """Concatenate arrays along the last axis, in a dtype."""
        low = [array.astype(dtype) for array in arrays]
        if len(low) == 1:
            return low[0]
        if not self.row_major or dtype != jnp.bfloat16:
            return jnp.concatenate(low, axis=-1)
        # XLA's CPU backend concatenates bfloat16 in float32, but not integers.
        bits = [jax.lax.bitcast_convert_type(array, jnp.uint16) for array in low]
        return jax.lax.bitcast_convert_type(jnp.concatenate(bits, axis=-1), jnp.bfloat16)

    def kernel_gradient(self, x: jax.Array, d_y: jax.Array) -> jax.Array:
        """Compute the gradient of the kernels from x and the cotangent of the result."""
        if not self.row_major:
            x, d_y = self.operand(x), self.operand(d_y)
            axes = tuple(range(x.ndim - 1))
            return jnp.tensordot(x, d_y, (axes, axes), preferred_element_type=accumulator_dtype(x))
        swap = x.shape[1] > d_y.shape[1]
        smaller, other = (d_y, x) if swap else (x, d_y)
        d_kernel = self.dot(self.operand(smaller).T, other)
        # The barrier keeps the transpose of this small result out of the matmul.
        d_kernel = jax.lax.optimization_barrier(d_kernel)
        return d_kernel.T if swap else d_kernel


def _split(y: jax.Array, widths: Sequence[int]) -> Sequence[jax.Array]:
    ends = itertools.accumulate(widths)
    return [y[..., end - width : end] for end, width in zip(ends, widths, strict=True)]
