"""The product of a dense layer and its gradient: operands in one dtype, sums in float32.

XLA's CPU backend has a fast product for ``[m, k] [k, n]`` as the arrays lie in memory. Others miss
it: a weight gradient x^T g, whose sum runs over the leading axis of both, takes up to twice as
long, and in bfloat16 every transposed operand costs the gain (measured with 4,096 tokens, 128 to
512 and back). So the gradient transposes an operand first, the smaller one, and in a way that XLA
does not fold into the product again.
"""

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from simplernn_jax.ops.checks import FLOATING, check_array, check_dtype
from simplernn_jax.ops.manual_axes import vary_like


def product(x: jax.Array, kernel: jax.Array, dtype: Any) -> jax.Array:
    """``x @ kernel``, ``[N, in] [in, out]``: operands in `dtype`, result at least float32."""
    return products(x, (kernel,), dtype)[0]


def products(x: jax.Array, kernels: Sequence[jax.Array], dtype: Any) -> tuple[jax.Array, ...]:
    """`product` of `x` with each kernel ``[in, out]``, computed as one, since it is read by all.

    Raises:
      ValueError: no kernel, wrong ranks, or shapes that do not fit together.
      TypeError: wrong dtypes.
    """
    if not kernels:
        raise ValueError("kernels: expected at least one; got none")
    sizes = check_array("x", x, "N in")
    for kernel in kernels:
        check_array("kernel", kernel, "in out", FLOATING, {"in": sizes["in"]})
    check_dtype("dtype", dtype)
    # Inside `shard_map` the gradient of an operand must be of the operand's type.
    kernels = tuple(vary_like(kernel, x) for kernel in kernels)
    return _products(vary_like(x, kernels[0]), kernels, dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _products(x: jax.Array, kernels: tuple[jax.Array, ...], dtype: Any) -> tuple[jax.Array, ...]:
    return _products_fwd(x, kernels, dtype)[0]


def _products_fwd(
    x: jax.Array, kernels: tuple[jax.Array, ...], dtype: Any
) -> tuple[tuple[jax.Array, ...], Any]:
    low = x.astype(dtype)
    y = _dot(low, _side_by_side(kernels, dtype))
    # An empty array keeps the dtype of what the gradient is of.
    return _taken_apart(y, kernels), (low, kernels, jnp.zeros((0,), x.dtype))


def _products_bwd(dtype: Any, residuals: Any, gradients: Any) -> tuple[jax.Array, Any]:
    low, kernels, like = residuals
    gradient = _side_by_side(gradients, dtype)
    d_x = _dot(gradient, _transposed(_side_by_side(kernels, dtype)))
    swap = low.shape[1] > gradient.shape[1]
    smaller, other = (gradient, low) if swap else (low, gradient)
    # The barrier keeps what transposes this small result out of the product.
    d_kernel = jax.lax.optimization_barrier(_dot(_transposed(smaller), other))
    d_kernels = _taken_apart(d_kernel.T if swap else d_kernel, kernels)
    return d_x.astype(like.dtype), tuple(
        d_kernel.astype(kernel.dtype) for d_kernel, kernel in zip(d_kernels, kernels, strict=True)
    )


_products.defvjp(_products_fwd, _products_bwd)


def _side_by_side(arrays: Sequence[jax.Array], dtype: Any) -> jax.Array:
    low = [array.astype(dtype) for array in arrays]
    if len(low) == 1:
        return low[0]
    if dtype == jnp.bfloat16:
        # As integers: XLA's CPU backend puts bfloat16 together in float32.
        bits = [jax.lax.bitcast_convert_type(array, jnp.uint16) for array in low]
        return jax.lax.bitcast_convert_type(jnp.concatenate(bits, axis=1), jnp.bfloat16)
    return jnp.concatenate(low, axis=1)


def _taken_apart(y: jax.Array, kernels: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    ends = itertools.accumulate(kernel.shape[1] for kernel in kernels)
    return tuple(
        y[:, end - kernel.shape[1] : end] for end, kernel in zip(ends, kernels, strict=True)
    )


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    dtype = jnp.promote_types(a.dtype, jnp.float32)
    return jnp.dot(_as_it_is(a), _as_it_is(b), preferred_element_type=dtype)


def _transposed(x: jax.Array) -> jax.Array:
    return _as_it_is(x).T


def _as_it_is(x: jax.Array) -> jax.Array:
    """`x`; on a CPU row by row in memory, so that transposing it makes another array."""
    if jax.default_backend() != "cpu":
        return x
    return with_layout_constraint(x, Layout((0, 1)))
