"""Matmul of a dense layer and its gradient: operands in one dtype, sums in float32.

On one device tokens are flattened, so that the gradient of a kernel contracts one axis. XLA's CPU
backend has a fast matmul for row-major ``[m, k] [k, n]`` only: the gradient of a kernel, x^T g,
contracts the leading axis of both and takes up to twice as long, and in bfloat16 any transposed
operand loses the speedup (measured: ``[4096, 128] [128, 512]`` and its transpose). So the gradient
first transposes the smaller operand, in a way that XLA does not fold into the matmul. Where the
processor multiplies bfloat16 no faster than float32, rounded operands are multiplied as float32.
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
from simplernn_jax.ops.native import has_fast_bfloat16
from simplernn_jax.ops.primitive import VJP, Implementations, apply, on_one_device


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
    result = accumulator_dtype(dtype)
    results = [jax.ShapeDtypeStruct((*x.shape[:-1], width), result) for width in widths]
    impls, vjp = _operation(jnp.dtype(dtype), x.dtype, widths, on_one_device(), has_fast_bfloat16())
    if x.dtype != dtype:
        vjp = dataclasses.replace(vjp, residual_types=((x.shape, jnp.dtype(dtype)),))
    return tuple(apply(impls, [*kernels, x], results, vjp))


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
) -> tuple[Implementations, VJP]:
    """Build the operation (*kernels, x) to outputs; residuals are the kernels and x in `dtype`."""
    row_major = _ROW_MAJOR if fast_bfloat16 or dtype != jnp.bfloat16 else _UPCAST_ROW_MAJOR
    count = len(widths)

    def flat(x: jax.Array) -> jax.Array:
        return _merged(x) if one_device else x

    def default(backend: _Backend, *args: jax.Array) -> Sequence[jax.Array]:
        *kernels, x = args
        y = _dot(backend, flat(x.astype(dtype)), backend.concatenate(kernels, dtype))
        return _split(y.reshape(*x.shape[:-1], y.shape[-1]), widths)

    def fwd(backend: _Backend, *args: jax.Array) -> Sequence[jax.Array]:
        return *default(backend, *args), args[-1].astype(dtype)

    def bwd(backend: _Backend, *args: jax.Array) -> Sequence[jax.Array]:
        kernels, (x, *cotangents) = args[:count], args[count:]
        shape, x = x.shape, flat(x)
        d_y = flat(backend.concatenate(cotangents, dtype))
        d_x = _dot(backend, d_y, backend.operand(backend.concatenate(kernels, dtype)).T)
        d_kernels = _split(backend.kernel_gradient(x, d_y), widths)
        d_x = d_x.astype(x_dtype).reshape(shape)
        return *(d.astype(k.dtype) for d, k in zip(d_kernels, kernels, strict=True)), d_x

    def restore_inputs(*residuals: jax.Array) -> Sequence[jax.Array]:
        return *residuals[:-1], residuals[-1].astype(x_dtype)

    def impls(function: Callable[..., Sequence[jax.Array]]) -> Implementations:
        on_cpu = row_major if one_device else _UPCAST
        # XLA's CPU backend aborts where a batched matmul has a constrained layout (jax 0.10).
        return Implementations(
            partial(function, _PLAIN),
            partial(function, on_cpu),
            partial(function, _UPCAST),
            cpu_supports_vmap=not one_device,
        )

    if dtype == x_dtype:
        return impls(default), VJP(impls(bwd))
    # The rounded x is half as large.
    saved = tuple(range(count))
    vjp = VJP(impls(bwd), impls(fwd), saved_inputs=saved, restore_inputs=restore_inputs)
    return impls(default), vjp


class _Backend(NamedTuple):
    """Parts of the matmul that differ between backends."""

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


def _contract(x: jax.Array, d_y: jax.Array) -> jax.Array:
    axes = tuple(range(x.ndim - 1))
    return jnp.tensordot(x, d_y, (axes, axes), preferred_element_type=accumulator_dtype(x))


def _contract_row_major(x: jax.Array, d_y: jax.Array) -> jax.Array:
    swap = x.shape[1] > d_y.shape[1]
    smaller, other = (d_y, x) if swap else (x, d_y)
    d_kernel = _dot(_ROW_MAJOR, _row_major(smaller).T, other)
    # The barrier keeps the transpose of this small result out of the matmul.
    d_kernel = jax.lax.optimization_barrier(d_kernel)
    return d_kernel.T if swap else d_kernel


def _upcast(x: jax.Array) -> jax.Array:
    return x.astype(accumulator_dtype(x))


_PLAIN = _Backend(lambda x: x, _concatenated, _contract)
_ROW_MAJOR = _Backend(_row_major, _concatenated_as_bits, _contract_row_major)
_UPCAST = _Backend(_upcast, _concatenated, lambda *pair: _contract(*map(_upcast, pair)))
"""Operands in float32, with the same results: XLA's CPU backend cannot multiply bfloat16 in every
layout that it may choose."""
_UPCAST_ROW_MAJOR = _Backend(
    lambda x: _row_major(_upcast(x)),
    _concatenated_as_bits,
    lambda *pair: _contract_row_major(*map(_upcast, pair)),
)
"""The same where XLA can, but not faster than float32."""


def _split(y: jax.Array, widths: Sequence[int]) -> Sequence[jax.Array]:
    ends = itertools.accumulate(widths)
    return [y[..., end - width : end] for end, width in zip(ends, widths, strict=True)]


def _dot(backend: _Backend, a: jax.Array, b: jax.Array) -> jax.Array:
    a, b = backend.operand(a), backend.operand(b)
    return jnp.dot(a, b, preferred_element_type=accumulator_dtype(a))
