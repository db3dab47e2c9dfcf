"""A short causal depthwise convolution of root-mean-square normalized inputs.

On a CPU it is one compiled C function forward and one backward (`rms_norm.c`). Its steps are bound
by memory: one pass is several times faster than XLA's code, which materializes every shifted input
and every summand.

Operands may be sharded under `jit` over batch and time: a shard needs the W - 1 normalized inputs
before its first token from the shard before, and for the gradient the cotangents of its own last
ones from the shard after. Channels are not sharded, since the norm is over all of them.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from simplernn_jax.array_types import Activations, ConvState
from simplernn_jax.ops.checks import BOOL, FLOATING, check_array
from simplernn_jax.ops.native import (
    CONVOLUTION_BACKWARD,
    CONVOLUTION_FORWARD,
    call_native,
    or_empty,
    use_native,
)
from simplernn_jax.ops.partitioning import MeshAxesByDim, Partitioned
from simplernn_jax.ops.primitive import VJP, Implementation, Implementations, apply
from simplernn_jax.ops.rms_norm import inverse_rms, rms_norm
from simplernn_jax.ops.segments import mask_to_last_segment

_X, _WEIGHTS, _RECENT, _TOKENS = "b t d", "w d", "b p d", "b t"
_REPLICATED = ("d", "w", "p")
_MINIMUM = (("t", "p"),)
"""A shard must be at least as long as the halo."""


def partition_convolution(has_starts: bool, has_scale: bool) -> Partitioned:
    """Partition (x, weights, recent[, starts]) to (y, final[, scale])."""

    def on_shards(impl: Implementation, mesh_axes: MeshAxesByDim) -> Implementation:
        time = mesh_axes["t"]

        def run(x: Any, weights: Any, recent: Any, *starts: Any) -> Sequence[jax.Array]:
            before = _inputs_before(time, x, recent, *starts)
            y, final, *scale = impl(x, weights, before, *starts)
            return y, _broadcast_from(jax.lax.axis_size(time) - 1, time, final), *scale

        return run if time else impl

    results = (_X, _RECENT, _TOKENS) if has_scale else (_X, _RECENT)
    return Partitioned(_inputs(has_starts), results, _REPLICATED, on_shards, _MINIMUM)


def partition_convolution_gradient(has_starts: bool) -> Partitioned:
    """Partition (inputs, scale, d_y, d_final) to the gradients of x, weights and recent."""

    def on_shards(impl: Implementation, mesh_axes: MeshAxesByDim) -> Implementation:
        time = mesh_axes["t"]

        def run(*args: Any) -> Sequence[jax.Array]:
            d_x, d_weights, d_recent = _shard_gradient(impl, time, *args) if time else impl(*args)
            return d_x, jax.lax.psum(d_weights, (*mesh_axes["b"], *time)), d_recent

        return run if time or mesh_axes["b"] else impl

    inputs = (*_inputs(has_starts), _TOKENS, _X, _RECENT)
    results = (_X, _WEIGHTS, _RECENT)
    return Partitioned(inputs, results, _REPLICATED, on_shards, _MINIMUM)


def _inputs(has_starts: bool) -> tuple[str, ...]:
    return (_X, _WEIGHTS, _RECENT, _TOKENS) if has_starts else (_X, _WEIGHTS, _RECENT)


def _shard_gradient(
    impl: Implementation, time: tuple[str, ...], x: Any, weights: Any, recent: Any, *others: Any
) -> Sequence[jax.Array]:
    *starts, scale, d_y, d_final = others
    past = recent.shape[1]
    before = _inputs_before(time, x, recent, *starts)
    # Only the first tokens of a shard read the inputs before it.
    first = [a[:, :past] for a in (*starts, scale, d_y)]
    _, _, d_before = impl(x[:, :past], weights, before, *first, jnp.zeros_like(d_final))
    size = jax.lax.axis_size(time)
    d_tail = jax.lax.ppermute(d_before, time, [(i + 1, i) for i in range(size - 1)])
    is_last = jax.lax.axis_index(time) == size - 1
    d_final = jnp.where(is_last, d_final, mask_to_last_segment(d_tail, *starts))
    d_x, d_weights, d_recent = impl(x, weights, before, *starts, scale, d_y, d_final)
    return d_x, d_weights, _broadcast_from(0, time, d_recent)


def _inputs_before(
    time: tuple[str, ...], x: jax.Array, recent: jax.Array, *starts: jax.Array
) -> jax.Array:
    """Compute the normalized inputs before this shard, zero where they are of other segments."""
    tail = rms_norm(x[:, x.shape[1] - recent.shape[1] :], native=False)
    size = jax.lax.axis_size(time)
    pairs = [(i, i + 1) for i in range(size - 1)]
    sent = jax.lax.ppermute(mask_to_last_segment(tail, *starts), time, pairs)
    return jnp.where(jax.lax.axis_index(time) == 0, recent, sent)


def _broadcast_from(index: int, time: tuple[str, ...], x: jax.Array) -> jax.Array:
    return jax.lax.psum(jnp.where(jax.lax.axis_index(time) == index, x, 0), time)


_TOKENS_PER_PARTIAL_SUM = 128
"""The gradient of the weights is summed in parts of this many tokens, which threads share."""


def rms_norm_convolution(
    x: Activations,
    weights: jax.Array,
    recent: ConvState,
    starts: jax.Array | None,
    *,
    normalize: bool = True,
    native: bool | None = None,
) -> tuple[Activations, ConvState]:
    """Compute ``y_t = sum_i w_i n_{t-i}`` for i in 0 .. W - 1, where ``n = rms_norm(x)``.

    Args:
      x: ``[B, T, D]``.
      weights: ``[W, D]``; ``weights[i]`` multiplies the input i tokens earlier.
      recent: inputs n before the first token, of its segment, ``[B, W - 1, D]``.
      starts: ``[B, T]`` bool, True where a token starts a segment; None if none does.
      normalize: False convolves `x` itself, never in C.
      native: as in `rms_norm`.

    Returns:
      ``[B, T, D]``, and n at the last W - 1 positions, regardless of segment; both
      in the dtype of `recent`.
    """
    sizes = check_array("x", x, "B T D")
    sizes = check_array("weights", weights, "W D", FLOATING, sizes)
    if sizes["W"] == 0:
        raise ValueError("weights: expected [W, D] with W of at least 1; got W = 0")
    sizes["P"] = sizes["W"] - 1
    check_array("recent", recent, "B P D", FLOATING, sizes)
    if starts is not None:
        check_array("starts", starts, "B T", BOOL, sizes)
    x, weights, recent = map(jnp.asarray, (x, weights, recent))  # as in `rms_norm`
    x = x.astype(recent.dtype)
    if not normalize:
        return _by_shifts(x, weights, recent, starts)
    if not use_native(x, native):
        normalized = rms_norm(x, native=False).astype(recent.dtype)
        return _by_shifts(normalized, weights, recent, starts)
    inputs = [x, weights.astype(x.dtype), recent, *([] if starts is None else [starts])]
    impls, fwd, bwd = _operation(starts is not None)
    vjp = VJP(bwd, fwd, residual_types=((x.shape[:2], x.dtype),))
    y, final = apply(impls, inputs, [x, recent], vjp)
    return y, final


def _by_shifts(
    x: jax.Array, weights: jax.Array, recent: jax.Array, starts: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Compute ``y_t = sum_i w_i x_{t-i}`` within segments, and the last W - 1 inputs."""
    past, length = recent.shape[1], x.shape[1]
    inputs = jnp.concatenate([recent, x], axis=1)
    weights = weights.astype(x.dtype)[:, None, None]
    y = x * weights[0]
    reachable = jnp.ones((x.shape[0], length), bool)
    for lag in range(1, past + 1):
        earlier = inputs[:, past - lag : past - lag + length]
        if starts is not None:
            late = jnp.pad(starts, ((0, 0), (lag - 1, 0)))[:, :length]
            reachable = reachable & ~late
            earlier = jnp.where(reachable[..., None], earlier, 0)
        y = y + earlier * weights[lag]
    return y, inputs[:, length:]


@functools.cache
def _operation(has_starts: bool) -> tuple[Implementations, Implementations, Implementations]:
    """Build (x, weights, recent[, starts]) to (y, final[, scale]), and the gradient."""
    rule = partition_convolution(has_starts, has_scale=False)
    with_scale = partition_convolution(has_starts, has_scale=True)
    gradient = partition_convolution_gradient(has_starts)
    return (
        Implementations(
            lambda *inputs: _forward(*inputs)[:2],
            lambda *inputs: _forward_in_c(*inputs)[:2],
            partitioning_rule=rule,
        ),
        Implementations(_forward, _forward_in_c, partitioning_rule=with_scale),
        Implementations(_gradient, _gradient_in_c, partitioning_rule=gradient),
    )


def _forward(
    x: jax.Array, weights: jax.Array, recent: jax.Array, starts: jax.Array | None = None
) -> Sequence[jax.Array]:
    scale = inverse_rms(x)
    return *_by_shifts(rms_norm(x, native=False), weights, recent, starts), scale


def _forward_in_c(
    x: jax.Array, weights: jax.Array, recent: jax.Array, starts: jax.Array | None = None
) -> Sequence[jax.Array]:
    results = [x, x[..., 0], recent]
    arguments = (x, weights, recent, or_empty(starts, x))
    y, scale, final = call_native(CONVOLUTION_FORWARD, results, *arguments)
    return y, final, scale


def _gradient(*args: jax.Array) -> Sequence[jax.Array]:
    x, weights, recent, *starts, _, d_y, d_final = args

    def function(x: jax.Array, weights: jax.Array, recent: jax.Array) -> Any:
        x = rms_norm(x, native=False)
        return _by_shifts(x, weights, recent, starts[0] if starts else None)

    return jax.vjp(function, x, weights, recent)[1]((d_y, d_final))


def _gradient_in_c(*args: jax.Array) -> Sequence[jax.Array]:
    x, weights, recent, *starts, scale, d_y, d_final = args
    parts = -(-x.shape[-2] // _TOKENS_PER_PARTIAL_SUM)
    partial_sums = jnp.broadcast_to(weights, (*x.shape[:-2], parts, *weights.shape))
    begins = or_empty(starts[0] if starts else None, x)
    arguments = (x, weights, recent, begins, scale, d_y, d_final)
    d_x, d_weights, d_recent = call_native(
        CONVOLUTION_BACKWARD, [x, partial_sums, recent], *arguments
    )
    return d_x, jnp.sum(d_weights, axis=(0, 1)), d_recent
