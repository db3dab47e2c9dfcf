"""Dense, norm and convolution layers, dropout, and initialization.

Mixed precision: parameters are float32; matmul operands are cast to `ModelConfig.precision` and
accumulated in float32, in which gates, recurrent states, norms, softmax and loss are computed too.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from simplernn_jax.array_types import Activations, ConvState, LogicalAxes, SegmentIds
from simplernn_jax.config import ModelConfig
from simplernn_jax.ops.checks import accumulator_dtype
from simplernn_jax.ops.rms_norm import rms_norm
from simplernn_jax.parallel.collectives import axis_size, psum
from simplernn_jax.parallel.sequence import sharded_convolution
from simplernn_jax.parallel.tensor import add_bias, fused_projection, lookup

PARAM_DTYPE = jnp.dtype("float32")
"""Dtype of all parameters, in any precision."""


EMBEDDING_AXES = LogicalAxes("vocab", "embed")


def uniform_fan_in(fan_in: int) -> nnx.Initializer:
    """Return the initializer of PyTorch's Linear: U(-1/sqrt(fan_in), 1/sqrt(fan_in))."""
    bound = 1 / math.sqrt(fan_in)

    def init(key: jax.Array, shape: Any, dtype: Any = jnp.float32, **_: Any) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def kernel_init(config: ModelConfig) -> nnx.Initializer | None:
    """Return the initializer of a model's kernels; None selects the one of PyTorch's `Linear`."""
    if config.block == "plain":
        return None
    swiglu_std = 0.02  # as in flash-linear-attention
    return nnx.initializers.normal(
        swiglu_std if config.block == "swiglu" else config.hidden_dim**-0.5
    )


class Embedding(nnx.Embed):
    """`nnx.Embed` with float32 parameters.

    Its vocabulary axis is sharded over ``tensor``, its feature axis over ``fsdp``.
    """

    def __init__(
        self, num_embeddings: int, features: int, *, init: nnx.Initializer, rngs: nnx.Rngs
    ):
        super().__init__(
            num_embeddings,
            features,
            param_dtype=PARAM_DTYPE,
            embedding_init=init,
            embedding_metadata={"axes": EMBEDDING_AXES},
            rngs=rngs,
        )

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Look up integer ids ``[...]``: ``[..., D]`` float32; see `parallel.tensor.lookup`."""
        return lookup(self.embedding[...], inputs)


class Dense(nnx.Linear):
    """`nnx.Linear` with float32 parameters, operands in `dtype` and results in float32."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        axes: tuple[str | None, str | None],
        *,
        rngs: nnx.Rngs,
        row_parallel: bool = False,
        dtype: Any = jnp.float32,
        kernel_init: nnx.Initializer | None = None,
        bias_init: nnx.Initializer | None = None,
        use_bias: bool = True,
    ):
        """Initialize the parameters; both initializers default to PyTorch's.

        `axes` are the logical axes of the kernel. If `row_parallel`, its first axis may be sharded
        over ``tensor``, not the second. `dtype` is used for the computation.
        """
        self.row_parallel = row_parallel
        super().__init__(
            in_features,
            out_features,
            use_bias=use_bias,
            dtype=dtype,
            param_dtype=PARAM_DTYPE,
            kernel_init=kernel_init or uniform_fan_in(in_features),
            bias_init=bias_init or uniform_fan_in(in_features),
            rngs=rngs,
            kernel_metadata={"axes": LogicalAxes(*axes), "decay": True},
            # Row-parallel outputs are summed over `tensor` before a replicated bias is added.
            bias_metadata={"axes": LogicalAxes(None if row_parallel else axes[1])},
        )

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Apply the layer: ``[..., in_features]`` to ``[..., out_features]``; see `fused_dense`."""
        return fused_dense(inputs, [self])[0]


def fused_dense(
    x: jax.Array,
    layers: Sequence[Dense],
    *,
    squared_relu: bool = False,
    without_bias: Sequence[Dense | None] = (),
) -> tuple[jax.Array, ...]:
    """Apply each of `layers` to `x` ``[..., in_features]`` as one fused matmul.

    All layers must have the same dtype and kernel axes. Returns ``[..., out_features]``, float32
    (float64 if the dtype is). See `fused_matmul` for `squared_relu`, of layers without a bias.
    Biases of layers that are also in `without_bias` are left out.
    """
    kernels = [layer.kernel[...] for layer in layers]
    first = layers[0]
    options = {"row_parallel": first.row_parallel, "squared_relu": squared_relu}
    outputs = fused_projection(x, kernels, first.dtype, **options)

    return tuple(
        y
        if layer.bias is None or any(layer is other for other in without_bias)
        else add_bias(y, layer.bias[...])
        for y, layer in zip(outputs, layers, strict=True)
    )


class RMSNorm(nnx.Module):
    """``scale * x / sqrt(mean(x^2) + epsilon)`` (arXiv:1910.07467), float32.

    The features may be sharded over ``tensor``, if `axis` is their logical axis.
    """

    def __init__(self, features: int, epsilon: float, *, axis: str | None = None):
        """Initialize the scale with ones."""
        self.features, self.epsilon, self.axis = features, epsilon, axis
        self.scale = nnx.Param(jnp.ones(features, PARAM_DTYPE), axes=LogicalAxes(axis))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalize ``[..., D]``, or this device's shard of it, along the last axis."""
        if self.axis is None or axis_size("tensor") == 1:
            y = rms_norm(x, epsilon=self.epsilon)
        else:
            total = psum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), "tensor")
            y = x * lax.rsqrt(total / self.features + self.epsilon)
        return y * jnp.expand_dims(self.scale[...], range(y.ndim - 1))


def _identity_init(key: jax.Array, shape: Any, dtype: Any = jnp.float32) -> jax.Array:
    return jnp.zeros(shape, dtype).at[0].set(1)


class ShortConvolution(nnx.Module):
    """``y_t = f(sum_n w_n x_{t-n})`` for n in 0 .. width - 1, within one segment; all float32.

    Initialized so that the convolution is the identity: ``w_0`` is 1, the rest 0. The residual
    block normalizes the inputs and has no f; unlike in Mamba (arXiv:2312.00752, section 3.4), its
    convolution precedes the input projections.
    """

    def __init__(
        self,
        width: int,
        features: int,
        *,
        rngs: nnx.Rngs,
        normalize: bool = False,
        activation: Callable[[jax.Array], jax.Array] | None = None,
        axis: str | None = None,
        use_bias: bool = False,
    ):
        """Initialize ``weights[n]``, which multiplies the input n tokens earlier.

        Args:
          width: W, tokens that a result depends on, the current one included.
          features: channels.
          rngs: source of initial values.
          normalize: apply `rms_norm` to the inputs first.
          activation: f; None is the identity.
          axis: logical axis of the channels.
          use_bias: add a bias, initially 0, before the activation.
        """
        self.width, self.features = width, features
        self.normalize, self.activation = normalize, activation
        self.channel_axes = () if axis is None else (None, axis)
        weights = _identity_init(rngs.params(), (width, features), PARAM_DTYPE)
        self.weights = nnx.Param(weights, axes=LogicalAxes(*self.channel_axes))
        bias = nnx.Param(jnp.zeros(features, PARAM_DTYPE), axes=LogicalAxes(axis))
        self.bias = bias if use_bias else None

    def initial_state(self, batch_size: int) -> ConvState:
        """Return zeros ``[B, W - 1, D]``, float32 (float64 under x64)."""
        return jnp.zeros((batch_size, self.width - 1, self.features))

    def state_axes(self) -> LogicalAxes:
        """Return the logical axes of the state."""
        return LogicalAxes("batch", *self.channel_axes)

    def __call__(
        self, x: Activations, state: ConvState | None, segment_ids: SegmentIds | None
    ) -> tuple[Activations, ConvState]:
        """Convolve a sequence.

        Args:
          x: ``[B, T, D]``, with this device's channels.
          state: (normalized) inputs before the first token, of its segment, ``[B, W - 1, D]``; None
            starts from zeros.
          segment_ids: ``[B, T]``; inputs of other segments count as zero.

        Returns:
          ``[B, T, D]`` and the state after the last token, in the dtype of `state`, float32
          (float64 under x64) without one.

        Raises what `rms_norm_convolution` does for arguments that do not fit.
        """
        if state is None:
            state = jnp.zeros((x.shape[0], self.width - 1, x.shape[2]))
        weights = self.weights[...]
        weights = weights.astype(accumulator_dtype(weights, state))  # a state under x64 is float64
        y, state = sharded_convolution(x, weights, state, segment_ids, normalize=self.normalize)
        y = y if self.bias is None else add_bias(y, self.bias[...])
        return y if self.activation is None else self.activation(y), state


_LEVELS = 1 << 8


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zero each value with probability `rate`, and divide the others by 1 - rate (arXiv:1207.0580).

    A quarter of the random bits of `nnx.Dropout`, whose generator takes a sixth of the train step
    of a small model on CPUs; the rate, in [0, 1), is rounded to a multiple of 1/256, at least one.
    `key` is typed; None is no dropout.
    """
    if key is None or rate == 0:
        return x
    level = min(max(round(rate * _LEVELS), 1), _LEVELS - 1)
    *leading, size = x.shape
    words = jax.random.bits(key, (*leading, -(-size // 4)), jnp.uint32)
    bits = lax.bitcast_convert_type(words, jnp.uint8).reshape(*leading, 4 * words.shape[-1])
    return jnp.where(bits[..., :size] >= jnp.uint8(level), x / (1 - level / _LEVELS), 0)
