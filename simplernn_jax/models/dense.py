"""Dense layers and their initialisation: float32 parameters, compute in the policy's dtype."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


def compute_dtype(precision: str) -> Any:
    """The dtype of dense layers under ``model.precision``."""
    return jnp.dtype(precision)


def uniform_fan_in(fan_in: int) -> nnx.Initializer:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)), as PyTorch's Linear draws its weight and bias."""
    bound = 1 / math.sqrt(fan_in)

    def init(key: jax.Array, shape: Any, dtype: Any = jnp.float32, **_: Any) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def dense(
    in_features: int,
    out_features: int,
    *,
    rngs: nnx.Rngs,
    dtype: Any = jnp.float32,
    kernel_init: nnx.Initializer | None = None,
    bias_init: nnx.Initializer | None = None,
    use_bias: bool = True,
) -> nnx.Linear:
    """A linear layer with float32 parameters; both initialisers default to PyTorch's."""
    return nnx.Linear(
        in_features,
        out_features,
        use_bias=use_bias,
        dtype=dtype,
        param_dtype=jnp.float32,
        kernel_init=kernel_init or uniform_fan_in(in_features),
        bias_init=bias_init or uniform_fan_in(in_features),
        rngs=rngs,
    )
