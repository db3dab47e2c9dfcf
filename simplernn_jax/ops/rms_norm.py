"""Root-mean-square normalization, and a short causal depthwise convolution of normalized inputs.

On a CPU each is one compiled C function forward and one backward (`cpu/rms_norm.c`). They are bound
by memory: XLA's CPU backend materializes the operands of reductions, every shifted input and every
summand, and takes several times as long as one pass (measured: 1.0 ms for the gradient of a norm of
4,096 x 128, where C takes 0.2).
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from simplernn_jax.array_types import Activations, ConvState
from simplernn_jax.ops.checks import BOOL, FLOATING, accumulator_dtype, check_array
from simplernn_jax.ops.native import call_native, or_empty, use_native
from simplernn_jax.ops.primitive import Operation

EPSILON = 1e-6
"""The same as in `vectors.h`."""

_TOKENS_PER_PARTIAL_SUM = 128
"""The gradient of the weights is summed in parts of this many tokens, which threads share."""


def rms_norm(x: jax.Array, *, epsilon: float = EPSILON) -> jax.Array:
    """Compute ``x / sqrt(mean(x^2) + epsilon)`` along the last axis, float32 (float64 if `x` is).

    Root mean square layer normalization (arXiv:1910.07467) without its scale, which the
    following projection absorbs.

    Args:
      x: ``[..., D]``.
      epsilon: positive.
    """
    check_array("x", x, "... D")
    x = jnp.asarray(x)  # without x64, float64 becomes float32
    x = x.astype(accumulator_dtype(x))
    if epsilon != EPSILON:
        # The norm of c x with EPSILON equals the norm of x with EPSILON / c^2.
        x = x * math.sqrt(EPSILON / epsilon)
    (y,) = (_NORM_IN_C if use_native(x) else _NORM_IN_XLA)(x)
    return y


def gated_rms_norm(x: jax.Array, gate: jax.Array) -> jax.Array:
    """Compute ``rms_norm(x) silu(gate)`` of arrays ``[..., D]``; see `rms_norm`."""
    check_array("gate", gate, "... D", FLOATING, check_array("x", x, "... D"))
    dtype = accumulator_dtype(x, gate)
    x, gate = jnp.asarray(x, dtype), jnp.asarray(gate, dtype)
    if use_native(x) and x.shape == gate.shape:
        (y,) = _GATED_NORM_IN_C(x, gate)
        return y
    return apply_gate(rms_norm(x), gate)


@jax.checkpoint
def apply_gate(y: jax.Array, gate: jax.Array) -> jax.Array:
    """Compute ``y silu(gate)``; the gradient computes silu again."""
    return y * jax.nn.silu(gate)


def inverse_rms(x: jax.Array) -> jax.Array:
    """Compute ``1 / sqrt(mean(x^2) + EPSILON)``, ``[..., D]`` to ``[...]``, in x's dtype."""
    return jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1) + EPSILON)


def _norm(x: jax.Array) -> Sequence[jax.Array]:
    scale = inverse_rms(x)
    return x * scale[..., None], scale


def _norm_in_c(x: jax.Array) -> Sequence[jax.Array]:
    return call_native("simplernn_norm_forward", [x, x[..., 0]], x)


def _norm_gradient(x: jax.Array, scale: jax.Array, d_y: jax.Array) -> Sequence[jax.Array]:
    y = x * scale[..., None]
    projection = jnp.mean(d_y * y, axis=-1, keepdims=True)
    return [(d_y - y * projection) * scale[..., None]]


def _norm_gradient_in_c(x: jax.Array, scale: jax.Array, d_y: jax.Array) -> Sequence[jax.Array]:
    return call_native("simplernn_norm_backward", [x], x, scale, d_y)


def _gated_norm(x: jax.Array, gate: jax.Array) -> Sequence[jax.Array]:
    (y,) = _NORM_IN_XLA(x)
    return apply_gate(y, gate), inverse_rms(x)


def _gated_norm_in_c(x: jax.Array, gate: jax.Array) -> Sequence[jax.Array]:
    return call_native("simplernn_norm_forward", [x, x[..., 0]], x, gate)


def _gated_norm_gradient(*args: jax.Array) -> Sequence[jax.Array]:
    x, gate, _, d_y = args
    return jax.vjp(lambda *inputs: _gated_norm(*inputs)[0], x, gate)[1](d_y)


def _gated_norm_gradient_in_c(*args: jax.Array) -> Sequence[jax.Array]:
    x, gate, scale, d_y = args
    return call_native("simplernn_norm_backward", [x, gate], x, scale, d_y, gate)


_NORM_IN_XLA = Operation(
    lambda x: _norm(x)[:1], fwd=Operation(_norm), bwd=Operation(_norm_gradient)
)
_NORM_IN_C = Operation(
    lambda x: _norm(x)[:1],
    lambda x: _norm_in_c(x)[:1],
    fwd=Operation(_norm, _norm_in_c),
    bwd=Operation(_norm_gradient, _norm_gradient_in_c),
)


_GATED_NORM_IN_C = Operation(
    lambda *inputs: _gated_norm(*inputs)[:1],
    lambda *inputs: _gated_norm_in_c(*inputs)[:1],
    fwd=Operation(_gated_norm, _gated_norm_in_c),
    bwd=Operation(_gated_norm_gradient, _gated_norm_gradient_in_c),
)


def rms_norm_convolution(
    x: Activations,
    weights: jax.Array,
    recent: ConvState,
    starts: jax.Array | None,
    *,
    normalize: bool = True,
) -> tuple[Activations, ConvState]:
    """Compute ``y_t = sum_i w_i n_{t-i}`` for i in 0 .. W - 1, where ``n = rms_norm(x)``.

    Args:
      x: ``[B, T, D]``.
      weights: ``[W, D]``; ``weights[i]`` multiplies the input i tokens earlier.
      recent: inputs n before the first token, of its segment, ``[B, W - 1, D]``.
      starts: ``[B, T]`` bool, True where a token starts a segment; None if none does.
      normalize: False convolves `x` itself, never in C.

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
    if not use_native(x):
        (normalized,) = _NORM_IN_XLA(x.astype(accumulator_dtype(x)))
        return _by_shifts(normalized.astype(recent.dtype), weights, recent, starts)
    inputs = [x, weights.astype(x.dtype), recent, *([] if starts is None else [starts])]
    y, final = _CONVOLUTION_IN_C(*inputs)
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


def _convolution(
    x: jax.Array, weights: jax.Array, recent: jax.Array, starts: jax.Array | None = None
) -> Sequence[jax.Array]:
    (normalized,) = _NORM_IN_XLA(x)
    return *_by_shifts(normalized, weights, recent, starts), inverse_rms(x)


def _convolution_in_c(
    x: jax.Array, weights: jax.Array, recent: jax.Array, starts: jax.Array | None = None
) -> Sequence[jax.Array]:
    results = [x, x[..., 0], recent]
    arguments = (x, weights, recent, or_empty(starts, x))
    y, scale, final = call_native("simplernn_convolution_forward", results, *arguments)
    return y, final, scale


def _convolution_gradient(*args: jax.Array) -> Sequence[jax.Array]:
    x, weights, recent, *starts, _, d_y, d_final = args

    def function(x: jax.Array, weights: jax.Array, recent: jax.Array) -> Any:
        (normalized,) = _NORM_IN_XLA(x)
        return _by_shifts(normalized, weights, recent, starts[0] if starts else None)

    return jax.vjp(function, x, weights, recent)[1]((d_y, d_final))


def _convolution_gradient_in_c(*args: jax.Array) -> Sequence[jax.Array]:
    x, weights, recent, *starts, scale, d_y, d_final = args
    parts = -(-x.shape[-2] // _TOKENS_PER_PARTIAL_SUM)
    partial_sums = jnp.broadcast_to(weights, (*x.shape[:-2], parts, *weights.shape))
    begins = or_empty(starts[0] if starts else None, x)
    arguments = (x, weights, recent, begins, scale, d_y, d_final)
    d_x, d_weights, d_recent = call_native(
        "simplernn_convolution_backward", [x, partial_sums, recent], *arguments
    )
    return d_x, jnp.sum(d_weights, axis=(0, 1)), d_recent


_CONVOLUTION_IN_C = Operation(
    lambda *inputs: _convolution(*inputs)[:2],
    lambda *inputs: _convolution_in_c(*inputs)[:2],
    fwd=Operation(_convolution, _convolution_in_c),
    bwd=Operation(_convolution_gradient, _convolution_gradient_in_c),
)
"""(x, weights, recent[, starts]) to (y, final)."""
