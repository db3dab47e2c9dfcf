"""Dense layers and their initialisation: float32 parameters, compute in the policy's dtype."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from simplernn_jax.models.product import product


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
    """`nnx.Linear` on flat tokens, with operands in `dtype` and results in float32."""

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """``[N, in_features]`` to ``[N, out_features]``, at least float32."""
        y = product(inputs, self.kernel[...], self.dtype)
        return y if self.bias is None else y + self.bias[...][None]


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
