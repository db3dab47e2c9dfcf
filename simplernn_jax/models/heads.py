"""What a mixer has around its heads: projections into them, and norm, gate and projection out."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from simplernn_jax.models.dense import Dense, dense


class Heads(nnx.Module):
    """Queries, keys and values of H heads, and the way of their outputs back to one width.

    What lies between, `SimpleRNNCell` and `Attention` each have their own.
    """

    def __init__(
        self,
        hidden_dim: int,
        key_dim: int,
        value_dim: int,
        output_dim: int,
        num_heads: int = 1,
        *,
        rngs: nnx.Rngs,
        forget_gate: bool,
        kernel_init: nnx.Initializer | None = None,
        gate_bias_init: nnx.Initializer | None = None,
        output_norm: bool = False,
        output_gate: bool = False,
        dtype: Any = jnp.float32,
    ):
        """Makes the projections.

        Args:
          hidden_dim: width of the input.
          key_dim: key channels of all heads together.
          value_dim: value channels of all heads together.
          output_dim: width of the output.
          num_heads: heads; divides key_dim and value_dim.
          rngs: source of initial values.
          forget_gate: make `gate_proj` too, of key_dim channels.
          kernel_init: initialiser of the matrices; None is PyTorch's, for biases too.
          gate_bias_init: initialiser of the forget gate's bias; None is as for other biases.
          output_norm: normalise each head's output to a root mean square of 1, then scale.
          output_gate: multiply the heads' output by silu(W_r x + b_r).
          dtype: compute dtype of the projections.

        Raises:
          ValueError: num_heads does not divide key_dim and value_dim.
        """
        if key_dim % num_heads or value_dim % num_heads:
            raise ValueError(f"num_heads={num_heads} must divide {key_dim=} and {value_dim=}")
        self.num_heads = num_heads
        self.key_dim = key_dim
        self.value_dim = value_dim
        bias_init = None if kernel_init is None else nnx.initializers.zeros_init()

        def projection(width: int, bias_init: nnx.Initializer | None = bias_init) -> Dense:
            return dense(
                hidden_dim,
                width,
                rngs=rngs,
                dtype=dtype,
                kernel_init=kernel_init,
                bias_init=bias_init,
            )

        self.query_proj = projection(key_dim)
        self.key_proj = projection(key_dim)
        self.value_proj = projection(value_dim)
        if forget_gate:
            self.gate_proj = projection(key_dim, gate_bias_init or bias_init)
        self.output_norm = nnx.RMSNorm(value_dim // num_heads, rngs=rngs) if output_norm else None
        self.output_gate_proj = projection(value_dim) if output_gate else None
        self.out_proj = dense(
            value_dim,
            output_dim,
            rngs=rngs,
            dtype=dtype,
            kernel_init=kernel_init,
            bias_init=bias_init,
        )

    def split_heads(self, y: jax.Array, x: jax.Array, dim: int) -> jax.Array:
        """A projection of `x` on `dim` channels to ``[..., H, dim / num_heads]``.

        H is what there is in `y`, ``[tokens, channels]``: all heads, or a part of them.
        """
        width = dim // self.num_heads
        return y.reshape(*x.shape[:-1], y.shape[-1] // width, width)

    def combine(self, y: jax.Array, x: jax.Array) -> jax.Array:
        """The heads' output ``[..., H, V]`` to ``[..., output_dim]``; x feeds the output gate."""
        if self.output_norm is not None:
            y = self.output_norm(y)
        y = y.reshape(-1, y.shape[-2] * y.shape[-1])
        if self.output_gate_proj is not None:
            y = y * jax.nn.silu(self.output_gate_proj(x.reshape(-1, x.shape[-1])))
        return self.out_proj(y).reshape(*x.shape[:-1], self.out_proj.out_features)
