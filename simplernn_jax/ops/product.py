"""The product of a dense layer and its gradient: operands in one dtype, sums in float32.

XLA's CPU backend has a fast product for ``[m, k] [k, n]`` as the arrays lie in memory. Others miss
it: a weight gradient x^T g, whose sum runs over the leading axis of both, takes up to twice as
long, and in bfloat16 every transposed operand costs the gain (measured with 4,096 tokens, 128 to
512 and back). So the gradient transposes an operand first, the smaller one, and in a way that XLA
does not fold into the product again.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from simplernn_jax.ops.manual_axes import vary_like


def product(x: jax.Array, kernel: jax.Array, dtype: Any) -> jax.Array:
    """``x @ kernel``, ``[N, in] [in, out]``: operands in `dtype`, result at least float32."""
    # Inside `shard_map` the gradient of an operand must be of the operand's type.
    return _product(vary_like(x, kernel), vary_like(kernel, x), dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x: jax.Array, kernel: jax.Array, dtype: Any) -> jax.Array:
    return _dot(x.astype(dtype), kernel.astype(dtype))


def _product_fwd(x: jax.Array, kernel: jax.Array, dtype: Any) -> tuple[jax.Array, Any]:
    low = x.astype(dtype)
    # An empty array keeps the dtype of what the gradient is of.
    return _dot(low, kernel.astype(dtype)), (low, kernel, jnp.zeros((0,), x.dtype))


def _product_bwd(dtype: Any, residuals: Any, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    low, kernel, like = residuals
    low_gradient = gradient.astype(dtype)
    d_x = _dot(low_gradient, _transposed(kernel.astype(dtype)))
    swap = low.shape[1] > low_gradient.shape[1]
    smaller, other = (low_gradient, low) if swap else (low, low_gradient)
    # The barrier keeps what transposes this small result out of the product.
    d_kernel = jax.lax.optimization_barrier(_dot(_transposed(smaller), other))
    d_kernel = d_kernel.T if swap else d_kernel
    return d_x.astype(like.dtype), d_kernel.astype(kernel.dtype)


_product.defvjp(_product_fwd, _product_bwd)


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
