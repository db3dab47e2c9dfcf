"""Root-mean-square normalisation: on a CPU one compiled C function forward and one backward.

XLA's CPU backend makes arrays of what its sums over rows read, and takes several times as long as
one pass over memory (measured: 1.0 ms for a gradient of 4,096 x 128, where `normalized.c` takes
0.2).
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from simplernn_jax.ops.checks import check_array
from simplernn_jax.ops.native import NORM_BACKWARD, NORM_FORWARD, takes_native
from simplernn_jax.ops.operation import Form, Forms, Gradient, apply
from simplernn_jax.ops.partitioning import Partitioned

EPSILON = 1e-6
"""As in `normalized.c`."""


def rms_norm(x: jax.Array, *, native: bool | None = None) -> jax.Array:
    """``x / sqrt(mean(x^2) + EPSILON)`` along the last axis, at least float32.

    Root mean square layer normalisation (arXiv:1910.07467) without its scale: what follows it here
    is linear in every channel, and has a scale of its own.

    Args:
      x: ``[..., D]``.
      native: call the C functions; None where it pays.

    Raises:
      ValueError: `x` has no axis.
      TypeError: `x` is not of floating point.
    """
    check_array("x", x, "... D")
    x = jnp.asarray(x)  # float64 of NumPy may be float32 here
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    forms, forward, reverse = _operation(x.ndim, takes_native(x, native))
    gradient = Gradient(reverse, forward, extras=((x.shape[:-1], x.dtype),))
    (y,) = apply(forms, [x], [x], gradient)
    return y


@functools.cache
def _operation(ndim: int, fast: bool) -> tuple[Forms, Forms, Forms]:
    """x to (y,), x to (y, scale), and (x, scale, cotangent of y) to its gradient."""
    scale = " ".join(f"a{axis}" for axis in range(ndim - 1))
    x = f"{scale} d"

    def forms(
        default: Form, in_c: Form, inputs: tuple[str, ...], results: tuple[str, ...]
    ) -> Forms:
        # XLA partitions what it can look into.
        return (
            Forms(default, in_c, None, Partitioned(inputs, results, ("d",)))
            if fast
            else Forms(default)
        )

    return (
        forms(lambda x: _forward(x)[:1], lambda x: _forward_in_c(x)[:1], (x,), (x,)),
        forms(_forward, _forward_in_c, (x,), (x, scale)),
        forms(_gradient, _gradient_in_c, (x, scale, x), (x,)),
    )


def _forward(x: jax.Array) -> Sequence[jax.Array]:
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1) + EPSILON)
    return x * scale[..., None], scale


def _forward_in_c(x: jax.Array) -> Sequence[jax.Array]:
    results = [jax.typeof(x), jax.typeof(x[..., 0])]
    return jax.ffi.ffi_call(NORM_FORWARD, results, vmap_method="broadcast_all")(x)


def _gradient(x: jax.Array, scale: jax.Array, d_y: jax.Array) -> Sequence[jax.Array]:
    y = x * scale[..., None]
    along = jnp.mean(d_y * y, axis=-1, keepdims=True)
    return [(d_y - y * along) * scale[..., None]]


def _gradient_in_c(x: jax.Array, scale: jax.Array, d_y: jax.Array) -> Sequence[jax.Array]:
    call = jax.ffi.ffi_call(NORM_BACKWARD, jax.typeof(x), vmap_method="broadcast_all")
    return [call(x, scale, d_y)]
