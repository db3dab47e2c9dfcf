"""The matmul of a dense layer and its gradient: operands in one dtype, sums in float32.

On one device tokens are flattened, so that the gradient of a kernel contracts one axis. XLA's CPU
backend has a fast matmul for ``[m, k] [k, n]`` as the arrays lie in memory. Others miss it: a
weight gradient x^T g, which contracts the leading axis of both, takes up to twice as long, and in
bfloat16 every transposed operand costs the gain (measured with 4,096 tokens, 128 to 512 and back).
So the gradient transposes an operand first, the smaller one, and in a way that XLA does not fold
into the matmul again.
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

from simplernn_jax.ops.checks import FLOATING, check_array, check_dtype
from simplernn_jax.ops.operation import Forms, Gradient, apply, on_one_device


def matmul(x: jax.Array, kernel: jax.Array, dtype: Any) -> jax.Array:
    """``x @ kernel``, ``[..., in] [in, out]``: operands in `dtype`, result at least float32."""
    return fused_matmul(x, (kernel,), dtype)[0]


def fused_matmul(x: jax.Array, kernels: Sequence[jax.Array], dtype: Any) -> tuple[jax.Array, ...]:
    """Compute `product` of `x` with each kernel ``[in, out]``, as one matmul.

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
    result = jnp.promote_types(dtype, jnp.float32)
    results = [jax.ShapeDtypeStruct((*x.shape[:-1], width), result) for width in widths]
    forward, gradient = _operation(jnp.dtype(dtype), x.dtype, widths, on_one_device())
    if x.dtype != dtype:  # the rounded x is kept, which is half as large
        extras = ((x.shape, jnp.dtype(dtype)),)
        gradient = dataclasses.replace(gradient, extras=extras)
    return tuple(apply(forward, [x, *kernels], results, gradient))


def merge_tokens(x: jax.Array) -> jax.Array:
    """Merge all axes but the last, unless XLA may have to partition them.

    Between two matmuls it saves memory: XLA then keeps one form of what lies between.
    """
    return _merged(x) if on_one_device() else x


def _merged(x: jax.Array) -> jax.Array:
    # Not -1, which stands for no size where there are no entries.
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


@functools.cache
def _operation(
    dtype: Any, x_dtype: Any, widths: tuple[int, ...], one_device: bool
) -> tuple[Forms, Gradient]:
    """(x, kernels) to their fused_matmul, whose gradient keeps the kernels and x in `dtype`."""

    def flat(x: jax.Array) -> jax.Array:
        return _merged(x) if one_device else x

    def forward(how: _How, x: jax.Array, *kernels: jax.Array) -> Sequence[jax.Array]:
        y = _dot(how, flat(x.astype(dtype)), how.beside(kernels, dtype))
        return _split(y.reshape(*x.shape[:-1], y.shape[-1]), widths)

    def with_rounded(how: _How, x: jax.Array, *kernels: jax.Array) -> Sequence[jax.Array]:
        return *forward(how, x, *kernels), x.astype(dtype)

    def backward(how: _How, *args: jax.Array) -> Sequence[jax.Array]:
        kernels, (low, *cotangents) = args[:count], args[count:]
        shape, low = low.shape, flat(low)
        d_y = flat(how.beside(cotangents, dtype))
        d_x = _dot(how, d_y, how.operand(how.beside(kernels, dtype)).T)
        d_kernel = how.of_kernel(low, d_y)
        d_kernels = _split(d_kernel, widths)
        pairs = zip(d_kernels, kernels, strict=True)
        return d_x.astype(x_dtype).reshape(shape), *(
            d_kernel.astype(k.dtype) for d_kernel, k in pairs
        )

    def in_order(*residuals: jax.Array) -> Sequence[jax.Array]:
        kernels, low = residuals[:count], residuals[count]
        return low.astype(x_dtype), *kernels

    def forms(function: Callable[..., Sequence[jax.Array]]) -> Forms:
        on_cpu = _ROW_BY_ROW if one_device else _WIDENED
        # XLA's CPU backend aborts where a batched matmul has a constrained layout (jax 0.10).
        return Forms(
            partial(function, _PLAIN),
            partial(function, on_cpu),
            partial(function, _WIDENED),
            vmaps_cpu=not one_device,
        )

    count = len(widths)
    if dtype == x_dtype:
        # x follows the kernels among the residuals as the rounded x does.
        return forms(forward), Gradient(
            forms(backward), kept=(*range(1, count + 1), 0), inputs=in_order
        )
    return forms(forward), Gradient(
        forms(backward),
        forms(with_rounded),
        kept=tuple(range(1, count + 1)),
        inputs=in_order,
    )


class _How(NamedTuple):
    """What XLA's CPU backend needs done in a way of its own."""

    operand: Callable[[jax.Array], jax.Array]
    """Applied to every operand."""
    beside: Callable[[Sequence[jax.Array], Any], jax.Array]
    """Arrays side by side, in a dtype."""
    of_kernel: Callable[[jax.Array, jax.Array], jax.Array]
    """Gradient of the kernels, from x and that of their products."""


def _concatenated(arrays: Sequence[jax.Array], dtype: Any) -> jax.Array:
    low = [array.astype(dtype) for array in arrays]
    return low[0] if len(low) == 1 else jnp.concatenate(low, axis=-1)


def _concatenated_as_bits(arrays: Sequence[jax.Array], dtype: Any) -> jax.Array:
    """XLA's CPU backend concatenates bfloat16 in float32, but not integers."""
    if dtype != jnp.bfloat16 or len(arrays) == 1:
        return _concatenated(arrays, dtype)
    bits = [jax.lax.bitcast_convert_type(array.astype(dtype), jnp.uint16) for array in arrays]
    return jax.lax.bitcast_convert_type(jnp.concatenate(bits, axis=-1), jnp.bfloat16)


def _row_by_row(x: jax.Array) -> jax.Array:
    """Constrain the layout, so that transposing `x` makes another array."""
    return with_layout_constraint(x, Layout((0, 1)))


def _contracted(low: jax.Array, d_y: jax.Array) -> jax.Array:
    axes = tuple(range(low.ndim - 1))
    return jnp.tensordot(low, d_y, (axes, axes), preferred_element_type=_sums(low))


def _contracted_row_by_row(low: jax.Array, d_y: jax.Array) -> jax.Array:
    swap = low.shape[1] > d_y.shape[1]
    smaller, other = (d_y, low) if swap else (low, d_y)
    d_kernel = _dot(_ROW_BY_ROW, _row_by_row(smaller).T, other)
    # The barrier keeps what transposes this small result out of the matmul.
    d_kernel = jax.lax.optimization_barrier(d_kernel)
    return d_kernel.T if swap else d_kernel


def _widened(x: jax.Array) -> jax.Array:
    return x.astype(_sums(x))


_PLAIN = _How(lambda x: x, _concatenated, _contracted)
_ROW_BY_ROW = _How(_row_by_row, _concatenated_as_bits, _contracted_row_by_row)
_WIDENED = _How(_widened, _concatenated, lambda *pair: _contracted(*map(_widened, pair)))
"""The same values: XLA's CPU backend cannot multiply bfloat16 in any layout that it may choose."""


def _split(y: jax.Array, widths: Sequence[int]) -> Sequence[jax.Array]:
    ends = itertools.accumulate(widths)
    return [y[..., end - width : end] for end, width in zip(ends, widths, strict=True)]


def _dot(how: _How, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.dot(how.operand(a), how.operand(b), preferred_element_type=_sums(a))


def _sums(x: jax.Array) -> Any:
    return jnp.promote_types(x.dtype, jnp.float32)
