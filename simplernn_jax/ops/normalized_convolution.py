"""A short causal convolution over root-mean-square normalised inputs, channel by channel.

On a CPU it is one compiled C function forward and one backward (`normalized.c`): each
of its steps alone does little but read and write its arrays, so one pass takes a few times less
than XLA's, which makes an array of every shifted input and of every product that it sums.
"""

from typing import Any

import jax
import jax.numpy as jnp

from simplernn_jax.array_types import Activations, RecentInputs
from simplernn_jax.ops.checks import check_convolution
from simplernn_jax.ops.manual_axes import vary_like
from simplernn_jax.ops.native import CONVOLUTION_BACKWARD, CONVOLUTION_FORWARD, is_worth_a_call
from simplernn_jax.ops.normalized import rms_normalized

_STRETCH = 128
"""Tokens whose gradients of the weights are summed apart, so that threads can share the work."""


def normalized_convolution(
    x: Activations,
    weights: jax.Array,
    recent: RecentInputs,
    starts: jax.Array | None,
    *,
    native: bool | None = None,
) -> tuple[Activations, RecentInputs]:
    """``y_t = sum_i w_i n_{t-i}`` for i in 0 .. W - 1, where ``n = rms_normalized(x)``.

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
    x = x.astype(recent.dtype)
    if native is None:
        native = is_worth_a_call(x)
    if not (native and x.size):
        return _by_shifts(x, weights, recent, starts)
    if starts is None:
        starts = jnp.zeros((0,), bool)
    # Inside `shard_map` the functions take inputs of one type.
    weights = weights.astype(x.dtype)
    weights, recent, starts = (vary_like(other, x) for other in (weights, recent, starts))
    return _in_one_pass(vary_like(x, recent), weights, recent, starts)


def _by_shifts(
    x: Activations, weights: jax.Array, recent: RecentInputs, starts: jax.Array | None
) -> tuple[Activations, RecentInputs]:
    length, past = x.shape[1], recent.shape[1]
    inputs = jnp.concatenate([recent, rms_normalized(x, native=False)], axis=1)
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


@jax.custom_vjp
def _in_one_pass(
    x: Activations, weights: jax.Array, recent: RecentInputs, starts: jax.Array
) -> tuple[Activations, RecentInputs]:
    return _in_one_pass_fwd(x, weights, recent, starts)[0]


def _in_one_pass_fwd(
    x: Activations, weights: jax.Array, recent: RecentInputs, starts: jax.Array
) -> tuple[Any, Any]:
    results = [jax.typeof(x), jax.typeof(x[..., 0]), jax.typeof(recent)]
    call = jax.ffi.ffi_call(CONVOLUTION_FORWARD, results, vmap_method="sequential")
    y, scale, final = call(x, weights, recent, starts)
    return (y, final), (x, weights, recent, starts, scale)


def _in_one_pass_bwd(residuals: Any, cotangents: Any) -> tuple[Any, ...]:
    x, weights, recent, _, _ = residuals
    parts = jnp.broadcast_to(weights, (len(x), -(-x.shape[1] // _STRETCH), *weights.shape))
    results = [jax.typeof(x), jax.typeof(parts), jax.typeof(recent)]
    call = jax.ffi.ffi_call(CONVOLUTION_BACKWARD, results, vmap_method="sequential")
    d_x, d_weights, d_recent = call(*residuals, *cotangents)
    return d_x, jnp.sum(d_weights, axis=(0, 1)), d_recent, None


_in_one_pass.defvjp(_in_one_pass_fwd, _in_one_pass_bwd)
