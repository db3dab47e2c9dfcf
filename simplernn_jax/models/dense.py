"""Dense layers and their initialisation: float32 parameters, compute in the policy's dtype."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from simplernn_jax.config import ModelConfig
from simplernn_jax.ops.matmul import fused_matmul
from simplernn_jax.sharding.collectives import gather, is_on_mesh, psum, remat_all_gather

PARAMETERS = jnp.dtype("float32")
"""Of all parameters, under any policy."""


class Dtypes(NamedTuple):
    """The policy of mixed precision: what is kept and computed in which dtype.

    Gates, sums, norms, softmax and loss are float32 under any policy.
    """

    parameters: Any
    """What is trained; operands of products are rounded from it each time."""
    compute: Any
    """Operands of the products of dense layers, whose sums are float32."""
    state: Any
    """The recurrent state between chunks of tokens and between calls."""


def dtypes_of(config: ModelConfig) -> Dtypes:
    """The policy that ``model.precision`` and ``model.state_precision`` name."""
    return Dtypes(PARAMETERS, jnp.dtype(config.precision), jnp.dtype(config.state_precision))


def uniform_fan_in(fan_in: int) -> nnx.Initializer:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)), as PyTorch's Linear draws its weight and bias."""
    bound = 1 / math.sqrt(fan_in)

    def init(key: jax.Array, shape: Any, dtype: Any = jnp.float32, **_: Any) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


class Dense(nnx.Linear):
    """`nnx.Linear` with operands in `dtype` and results in float32.

    On a mesh its kernel may lie apart, as `parallel.shardings` says; which part a device holds
    shows in the shapes. Along ``fsdp`` lies the side that is the width of the stack: it is
    gathered where it is used, and for the gradient once more. Along ``tensor`` lies the other
    one: outputs of which each device makes its own, or inputs of which each has its own, so that
    the outputs are sums over the devices.
    """

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """``[..., in_features]`` to ``[..., out_features]``, this device's part."""
        return fused_projection(inputs, [self])[0]


def fused_projection(x: jax.Array, layers: Sequence[Dense]) -> tuple[jax.Array, ...]:
    """What each of `layers`, of one dtype, makes of ``x``, ``[..., in_features]``."""
    kernels = tuple(layer.kernel[...] for layer in layers)
    dtype = layers[0].dtype
    outputs: tuple[jax.Array, ...]
    if is_on_mesh():
        outputs = remat_all_gather(partial(_gathered_products, dtype=dtype))(x, kernels)
        if x.shape[-1] != layers[0].in_features:
            outputs = psum(outputs, "tensor")
    else:
        outputs = fused_matmul(x, kernels, dtype)

    def biased(y: jax.Array, layer: Dense) -> jax.Array:
        return y if layer.bias is None else y + jnp.expand_dims(layer.bias[...], range(y.ndim - 1))

    return tuple(biased(y, layer) for y, layer in zip(outputs, layers, strict=True))


def _gathered_products(
    x: jax.Array, kernels: tuple[jax.Array, ...], *, dtype: Any
) -> tuple[jax.Array, ...]:
    apart = 0 if kernels[0].shape[0] != x.shape[-1] else 1
    whole = [gather(kernel, "fsdp", apart, after=x) for kernel in kernels]
    return fused_matmul(x, whole, dtype)


def dense(
    in_features: int,
    out_features: int,
    *,
    rngs: nnx.Rngs,
    dtype: Any = jnp.float32,
    kernel_init: nnx.Initializer | None = None,
    bias_init: nnx.Initializer | None = None,
    use_bias: bool = True,
) -> Dense:
    """A linear layer with float32 parameters; both initialisers default to PyTorch's."""
    return Dense(
        in_features,
        out_features,
        use_bias=use_bias,
        dtype=dtype,
        param_dtype=PARAMETERS,
        kernel_init=kernel_init or uniform_fan_in(in_features),
        bias_init=bias_init or uniform_fan_in(in_features),
        rngs=rngs,
    )
