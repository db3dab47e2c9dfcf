"""Root-mean-square normalization with a learned scale."""

import jax
import jax.numpy as jnp
from flax import nnx

from simplernn_jax.models.dense import PARAM_DTYPE
from simplernn_jax.ops.rms_norm import rms_norm


class RMSNorm(nnx.Module):
    """``scale * x / sqrt(mean(x^2) + epsilon)`` (arXiv:1910.07467), float32."""

    def __init__(self, features: int, epsilon: float):
        """Initialize the scale with ones."""
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.ones(features, PARAM_DTYPE))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalize ``[..., D]`` along the last axis."""
        y = rms_norm(x, epsilon=self.epsilon)
        return y * jnp.expand_dims(self.scale[...], range(y.ndim - 1))
