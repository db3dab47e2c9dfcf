"""The product of a dense layer and its gradient: operands in one dtype, sums in float32.

XLA's CPU backend has a fast product for ``[m, k] [k, n]`` as the arrays lie in memory. Others miss
it: a weight gradient x^T g, whose sum runs over the leading axis of both, takes up to twice as
long, and in bfloat16 every transposed operand costs the gain (measured with 4,096 tokens, 128 to
512 and back). So the gradient transposes an operand first, the smaller one, and in a way that XLA
does not fold into the product again.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from simplernn_jax.ops.operation import Forms, Gradient, apply

_Layout = Callable[[jax.Array], jax.Array]


def product(x: jax.Array, kernel: jax.Array, dtype: Any) -> jax.Array:
    """``x @ kernel``, ``[N, in] [in, out]``: operands in `dtype`, result at least float32."""
    return products(x, (kernel,), dtype)[0]


def products(x: jax.Array, kernels: Sequence[jax.Array], dtype: Any) -> tuple[jax.Array, ...]:
    """Compute `product` of `x` with each kernel ``[in, out]``, as one matmul."""
    results = [
        jax.ShapeDtypeStruct((x.shape[0], kernel.shape[1]), jnp.promote_types(dtype, jnp.float32))
        for kernel in kernels
    ]
    # XLA's partitioner may gather what has a constrained layout (jax 0.10).
    one_device = jax.device_count() == 1 or bool(jax.sharding.get_abstract_mesh().manual_axes)
    widths = tuple(kernel.shape[1] for kernel in kernels)
    forward, gradient = _operation(jnp.dtype(dtype), x.dtype, widths, one_device)
    if x.dtype != dtype:  # the rounded x is kept, which is half as large
        extras = ((x.shape, jnp.dtype(dtype)),)
        gradient = dataclasses.replace(gradient, extras=extras)
    return tuple(apply(forward, [x, *kernels], results, gradient))


@functools.cache
def _operation(
    dtype: Any, x_dtype: Any, widths: tuple[int, ...], one_device: bool
) -> tuple[Forms, Gradient]:
    """(x, kernels) to their products, whose gradient keeps the kernels and x in `dtype`."""

    def forward(as_it_is: _Layout, x: jax.Array, *kernels: jax.Array) -> Sequence[jax.Array]:
        return _split(_dot(as_it_is, x.astype(dtype), _side_by_side(kernels, dtype)), widths)

    def with_rounded(as_it_is: _Layout, x: jax.Array, *kernels: jax.Array) -> Sequence[jax.Array]:
        return *forward(as_it_is, x, *kernels), x.astype(dtype)

    def backward(as_it_is: _Layout, *args: jax.Array) -> Sequence[jax.Array]:
        kernels, (low, *cotangents) = args[:count], args[count:]
        d_y = _side_by_side(cotangents, dtype)
        d_x = _dot(as_it_is, d_y, as_it_is(_side_by_side(kernels, dtype)).T)
        swap = low.shape[1] > d_y.shape[1]
        smaller, other = (d_y, low) if swap else (low, d_y)
        # The barrier keeps what transposes this small result out of the matmul.
        d_kernel = jax.lax.optimization_barrier(_dot(as_it_is, as_it_is(smaller).T, other))
        d_kernels = _split(d_kernel.T if swap else d_kernel, widths)
        pairs = zip(d_kernels, kernels, strict=True)
        return d_x.astype(x_dtype), *(d_kernel.astype(k.dtype) for d_kernel, k in pairs)

    def in_order(*residuals: jax.Array) -> Sequence[jax.Array]:
        kernels, low = residuals[:count], residuals[count]
        return low.astype(x_dtype), *kernels

    def forms(function: Callable[..., Sequence[jax.Array]]) -> Forms:
        # XLA's CPU backend alone needs its operands row by row.
        default = partial(function, lambda x: x)
        return Forms(default, partial(function, _row_by_row) if one_device else None)

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


def _side_by_side(arrays: Sequence[jax.Array], dtype: Any) -> jax.Array:
    low = [array.astype(dtype) for array in arrays]
    if len(low) == 1:
        return low[0]
    if dtype == jnp.bfloat16:
        # As integers: XLA's CPU backend puts bfloat16 together in float32.
        bits = [jax.lax.bitcast_convert_type(array, jnp.uint16) for array in low]
        return jax.lax.bitcast_convert_type(jnp.concatenate(bits, axis=1), jnp.bfloat16)
    return jnp.concatenate(low, axis=1)


def _split(y: jax.Array, widths: Sequence[int]) -> Sequence[jax.Array]:
    ends = itertools.accumulate(widths)
    return [y[:, end - width : end] for end, width in zip(ends, widths, strict=True)]


def _dot(as_it_is: _Layout, a: jax.Array, b: jax.Array) -> jax.Array:
    dtype = jnp.promote_types(a.dtype, jnp.float32)
    return jnp.dot(as_it_is(a), as_it_is(b), preferred_element_type=dtype)


def _row_by_row(x: jax.Array) -> jax.Array:
    """Constrain the layout, so that transposing `x` makes another array."""
    return with_layout_constraint(x, Layout((0, 1)))
