"""The SimpleRNN cell: one token as a Flax RNN cell, a whole sequence as one operator call."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from simplernn_jax.array_types import Activations, HeadState, SegmentIds
from simplernn_jax.models.dense import dense
from simplernn_jax.ops import gated_linear_recurrence, recurrent_step
from simplernn_jax.parallel.collectives import axis_size
from simplernn_jax.parallel.sequence import recurrence_over_stretches


class SimpleRNNCell(nnx.RNNCellBase):
    """One token of SimpleRNN, for `nnx.RNN` or a loop of one's own.

    Per head, with K = key_dim / num_heads and V = value_dim / num_heads::

        q = (W_q x + b_q) query_scale     k = sigmoid(W_k x + b_k)
        g = sigmoid(W_g x + b_g)          v = W_v x + b_v
        S' = diag(g) S + k v^T            y = W_o concat_heads(S'^T q) + b_o

    With one head and query scale 1 it is exactly the cell of the PyTorch project. The carry is
    the state ``[B, H, K, V]``, float32 unless `state_dtype` is another.
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
        query_scale: float = 1.0,
        kernel_init: nnx.Initializer | None = None,
        gate_bias_init: nnx.Initializer | None = None,
        output_norm: bool = False,
        output_gate: bool = False,
        dtype: Any = jnp.float32,
        state_dtype: Any = jnp.float32,
    ):
        """Makes the projections.

        Args:
          hidden_dim: width of the input.
          key_dim: key channels of all heads together.
          value_dim: value channels of all heads together.
          output_dim: width of the output.
          num_heads: heads; divides key_dim and value_dim.
          rngs: source of initial values.
          query_scale: factor on the queries.
          kernel_init: initialiser of the matrices; None is PyTorch's, for biases too.
          gate_bias_init: initialiser of the gate's bias; None is as for other biases.
          output_norm: normalise each head's output to a root mean square of 1, then scale.
          output_gate: multiply the heads' output by silu(W_r x + b_r).
          dtype: compute dtype of the projections.
          state_dtype: of the state. Below float32, it is rounded between tokens, or chunks of them
            (see `ops.narrow_state`).

        Raises:
          ValueError: num_heads does not divide key_dim and value_dim.
        """
        if key_dim % num_heads or value_dim % num_heads:
            raise ValueError(f"num_heads={num_heads} must divide {key_dim=} and {value_dim=}")
        self.num_heads = num_heads
        self.key_dim = key_dim
        self.value_dim = value_dim
        self.query_scale = query_scale
        # None: the sums' own, float32 (float64 under x64).
        self.narrow = None if state_dtype == jnp.float32 else jnp.dtype(state_dtype)
        bias_init = None if kernel_init is None else nnx.initializers.zeros_init()

        def projection(width: int, bias_init: nnx.Initializer | None = bias_init) -> nnx.Linear:
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

    def initial_state(self, batch_size: int) -> HeadState:
        """Zeros ``[B, H, K, V]``, of the state's dtype."""
        heads = self.num_heads
        shape = (batch_size, heads, self.key_dim // heads, self.value_dim // heads)
        return jnp.zeros(shape, self.narrow)

    def project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """q, k, v, log_gate of ``[..., hidden_dim]`` inputs, each ``[..., H, K or V]``."""
        # Tokens are flattened: the gradient of a matrix then contracts one axis, the fast path.
        flat = x.reshape(-1, x.shape[-1])

        def heads(y: jax.Array, width: int) -> jax.Array:
            # By width: on a mesh with an axis `tensor`, a device has some of the heads.
            width //= self.num_heads
            return y.reshape(*x.shape[:-1], y.shape[-1] // width, width)

        q = self.query_proj(flat) * self.query_scale
        k = jax.nn.sigmoid(self.key_proj(flat))
        log_gate = jax.nn.log_sigmoid(self.gate_proj(flat))
        key_dim, value_dim = self.key_dim, self.value_dim
        return (
            heads(q, key_dim),
            heads(k, key_dim),
            heads(self.value_proj(flat), value_dim),
            heads(log_gate, key_dim),
        )

    def combine(self, y: jax.Array, x: jax.Array) -> jax.Array:
        """The heads' output ``[..., H, V]`` to ``[..., output_dim]``; x feeds the output gate."""
        if self.output_norm is not None:
            y = self.output_norm(y)
        y = y.reshape(-1, y.shape[-2] * y.shape[-1])
        if self.output_gate_proj is not None:
            y = y * jax.nn.silu(self.output_gate_proj(x.reshape(-1, x.shape[-1])))
        return self.out_proj(y).reshape(*x.shape[:-1], -1)

    def __call__(self, carry: HeadState, inputs: jax.Array) -> tuple[HeadState, jax.Array]:
        """One token: state ``[B, H, K, V]`` and input ``[B, hidden_dim]`` to the next of each."""
        sums = jnp.promote_types(carry.dtype, jnp.float32)
        y, state = recurrent_step(*self.project(inputs), carry.astype(sums))
        return state.astype(carry.dtype), self.combine(y, inputs)

    def initialize_carry(
        self, input_shape: tuple[int, ...], rngs: Any = None, carry_init: Any = None
    ) -> HeadState:
        """A zero state for inputs of shape ``(B, hidden_dim)``, as `nnx.RNN` asks for it."""
        return self.initial_state(input_shape[0])

    @property
    def num_feature_axes(self) -> int:
        """Feature axes of the input: one."""
        return 1


class SimpleRNN(nnx.Module):
    """`SimpleRNNCell` over a sequence in one call of the operator; same arguments."""

    def __init__(
        self,
        hidden_dim: int,
        key_dim: int,
        value_dim: int,
        output_dim: int,
        num_heads: int = 1,
        *,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        self.cell = SimpleRNNCell(
            hidden_dim, key_dim, value_dim, output_dim, num_heads, rngs=rngs, **options
        )

    def initial_state(self, batch_size: int) -> HeadState:
        """Zeros ``[B, H, K, V]``, of the state's dtype."""
        return self.cell.initial_state(batch_size)

    def __call__(
        self,
        x: Activations,
        state: HeadState | None = None,
        segment_ids: SegmentIds | None = None,
    ) -> tuple[Activations, HeadState]:
        """Runs the layer over time.

        Args:
          x: ``[B, T, hidden_dim]``.
          state: ``[B, H, K, V]`` before the first token; None is zero.
          segment_ids: ``[B, T]``; a change of id clears the state exactly.

        Returns:
          ``[B, T, output_dim]`` and the state after the last token.
        """
        q, k, v, log_gate = self.cell.project(x)
        if axis_size("sequence") > 1:
            y, state = recurrence_over_stretches(q, k, v, log_gate, state, segment_ids)
        else:
            y, state = gated_linear_recurrence(
                q,
                k,
                v,
                log_gate,
                initial_state=state,
                segment_ids=segment_ids,
                state_dtype=self.cell.narrow,
            )
        return self.cell.combine(y, x), state
