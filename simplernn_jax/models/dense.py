"""Dense layers and their initialisation: float32 parameters, compute in the policy's dtype."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from simplernn_jax.parallel.collectives import gather, gathering_again, is_on_mesh, sum_over


def compute_dtype(precision: str) -> Any:
    """The dtype of dense layers under ``model.precision``."""
    return jnp.dtype(precision)


def uniform_fan_in(fan_in: int) -> nnx.Initializer:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)), as PyTorch's Linear draws its weight and bias."""
    bound = 1 / math.sqrt(fan_in)

    def init(key: jax.Array, shape: Any, dtype: Any = jnp.float32, **_: Any) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


class Dense(nnx.Linear):
    """`nnx.Linear` whose kernel may lie apart on a mesh, as `parallel.shardings` says.

    Which part a device holds shows in the shapes. Along ``fsdp`` lies the side that is the width
    of the stack: it is gathered where it is used, and for the gradient once more. Along
    ``tensor`` lies the other one: outputs of which each device makes its own, or inputs of which
    each has its own, so that the outputs are sums over the devices.
    """

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """``[..., in_features]`` to ``[..., out_features]``; this device's part of either."""
        if not is_on_mesh():
            return super().__call__(inputs)
        dtype = self.dtype
        y = gathering_again(partial(_product, dtype=dtype))(inputs, self.kernel[...])
        if inputs.shape[-1] != self.in_features:
            y = sum_over(y, "tensor")
        if self.bias is None:
            return y.astype(dtype)
        bias = self.bias[...].astype(dtype)
        return y.astype(dtype) + bias.reshape((1,) * (y.ndim - 1) + (-1,))


def _product(x: jax.Array, kernel: jax.Array, *, dtype: Any) -> jax.Array:
    """``[..., in]`` times this device's kernel, float32 at least, since it may be summed."""
    apart = 0 if kernel.shape[0] != x.shape[-1] else 1
    whole = gather(kernel, "fsdp", apart, after=x)
    return jnp.dot(
        x.astype(dtype),
        whole.astype(dtype),
        preferred_element_type=jnp.promote_types(dtype, jnp.float32),
    )


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
        param_dtype=jnp.float32,
        kernel_init=kernel_init or uniform_fan_in(in_features),
        bias_init=bias_init or uniform_fan_in(in_features),
        rngs=rngs,
    )
