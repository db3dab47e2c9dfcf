"""A short causal convolution over root-mean-square normalised inputs, channel by channel.

On a CPU it is one compiled C function forward and one backward (`normalized.c`): each
of its steps alone does little but read and write its arrays, so one pass takes a few times less
than XLA's, which makes an array of every shifted input and of every product that it sums.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from simplernn_jax.array_types import Activations, ConvState
from simplernn_jax.ops.checks import check_convolution
from simplernn_jax.ops.collectives import vary_like
from simplernn_jax.ops.convolution_sharding import (
    partition_convolution,
    partition_convolution_gradient,
)
from simplernn_jax.ops.native import CONVOLUTION_BACKWARD, CONVOLUTION_FORWARD, takes_native
from simplernn_jax.ops.operation import Forms, Gradient, apply
from simplernn_jax.ops.rms_norm import EPSILON, rms_norm

_STRETCH = 128
"""Tokens whose gradients of the weights are summed apart, so that threads can share the work."""


def rms_norm_convolution(
    x: Activations,
    weights: jax.Array,
    recent: ConvState,
    starts: jax.Array | None,
    *,
    native: bool | None = None,
) -> tuple[Activations, ConvState]:
    """``y_t = sum_i w_i n_{t-i}`` for i in 0 .. W - 1, where ``n = rms_norm(x)``.

    Args:
      x: ``[B, T, D]``.
      weights: ``[W, D]``; row i belongs to the input i tokens ago.
      recent: n before the first token, ``[B, W - 1, D]``, of the first token's segment.
      starts: ``[B, T]`` bool: the token begins a segment, and nothing is taken from before it.
        None: no token does.
      native: call the C functions; None where it pays.

    Returns:
      ``[B, T, D]``, and the last W - 1 of recent and n, whatever their segment.

    Raises:
      ValueError: wrong ranks, or shapes that do not fit together.
      TypeError: wrong dtypes.
    """
    check_convolution(x, weights, recent, starts)
    x, weights, recent = map(jnp.asarray, (x, weights, recent))  # float64 may be float32 here
    x = x.astype(recent.dtype)
    if not takes_native(x, native):
        return _by_shifts(x, weights, recent, starts)
    inputs = [x, weights.astype(x.dtype), recent, *([] if starts is None else [starts])]
    forms, forward, reverse = _operation(starts is not None)
    gradient = Gradient(reverse, forward, extras=((x.shape[:2], x.dtype),))
    y, final = apply(forms, inputs, [x, recent], gradient)
    return y, final


def _by_shifts(
    x: Activations, weights: jax.Array, recent: ConvState, starts: jax.Array | None
) -> tuple[Activations, ConvState]:
    length, past = x.shape[1], recent.shape[1]
    inputs = jnp.concatenate([recent, rms_norm(x, native=False)], axis=1)
    weights = weights[:, None, None]
    y = inputs[:, past:] * weights[0]
    reachable = jnp.ones(x.shape[:2], bool)
    for lag in range(1, past + 1):
        earlier = inputs[:, past - lag : past - lag + length]
        if starts is not None:
            late = jnp.pad(starts, ((0, 0), (lag - 1, 0)))[:, :length]
            reachable = reachable & ~late
            earlier = jnp.where(reachable[..., None], earlier, 0)
        y = y + earlier * weights[lag]
    return y, inputs[:, length:]


@functools.cache
def _operation(has_starts: bool) -> tuple[Forms, Forms, Forms]:
    """Inputs to (y, final), inputs to (y, final, scale), and the gradient.

    Inputs are x, weights, recent and, where there are any, starts.
    """
    return (
        Forms(
            lambda *inputs: _forward(*inputs)[:2],
            lambda *inputs: _forward_in_c(*inputs)[:2],
            None,
            partition_convolution(has_starts, has_scale=False),
        ),
        Forms(_forward, _forward_in_c, None, partition_convolution(has_starts, has_scale=True)),
        Forms(_gradient, _gradient_in_c, None, partition_convolution_gradient(has_starts)),
    )


def _forward(
    x: jax.Array, weights: jax.Array, recent: jax.Array, starts: jax.Array | None = None
) -> Sequence[jax.Array]:
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1) + EPSILON)
    return *_by_shifts(x, weights, recent, starts), scale


def _forward_in_c(
    x: jax.Array, weights: jax.Array, recent: jax.Array, starts: jax.Array | None = None
) -> Sequence[jax.Array]:
    results = [jax.typeof(x), jax.typeof(x[..., 0]), jax.typeof(recent)]
    call = jax.ffi.ffi_call(CONVOLUTION_FORWARD, results, vmap_method="broadcast_all")
    y, scale, final = call(x, weights, recent, _or_empty(starts, x))
    return y, final, scale


def _gradient(*args: jax.Array) -> Sequence[jax.Array]:
    *inputs, _, d_y, d_final = args
    x, weights, recent, *starts = inputs

    def function(x: jax.Array, weights: jax.Array, recent: jax.Array) -> Any:
        return _by_shifts(x, weights, recent, starts[0] if starts else None)

    return jax.vjp(function, x, weights, recent)[1]((d_y, d_final))


def _gradient_in_c(*args: jax.Array) -> Sequence[jax.Array]:
    *inputs, scale, d_y, d_final = args
    x, weights, recent, *starts = inputs
    pieces = (*x.shape[:-2], -(-x.shape[-2] // _STRETCH), *weights.shape)
    parts = jnp.broadcast_to(weights, pieces)
    results = [jax.typeof(x), jax.typeof(parts), jax.typeof(recent)]
    call = jax.ffi.ffi_call(CONVOLUTION_BACKWARD, results, vmap_method="broadcast_all")
    begins = _or_empty(starts[0] if starts else None, x)
    d_x, d_weights, d_recent = call(x, weights, recent, begins, scale, d_y, d_final)
    return d_x, jnp.sum(d_weights, axis=(0, 1)), d_recent


def _or_empty(starts: jax.Array | None, x: jax.Array) -> jax.Array:
    # No argument of a C function can be left out; this one may be empty.
    return vary_like(jnp.zeros((0,), bool), x) if starts is None else starts
