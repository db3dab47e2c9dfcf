"""The SimpleRNN cell: one token as a Flax RNN cell, a whole sequence as one operator call."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from simplernn_jax.array_types import Activations, HeadState, SegmentIds
from simplernn_jax.models.heads import Heads
from simplernn_jax.ops import gated_linear_recurrence, recurrent_step
from simplernn_jax.parallel.collectives import axis_size
from simplernn_jax.parallel.sequence import recurrence_over_stretches


class SimpleRNNCell(Heads, nnx.RNNCellBase):
    """One token of SimpleRNN, for `nnx.RNN` or a loop of one's own.

    Per head, with K = key_dim / num_heads and V = value_dim / num_heads::

        q = (W_q x + b_q) query_scale     k = sigmoid(W_k x + b_k)
        g = sigmoid(W_g x + b_g)          v = W_v x + b_v
        S' = diag(g) S + k v^T            y = W_o concat_heads(S'^T q) + b_o

    With one head and query scale 1 it is exactly the cell of the PyTorch project. The carry is
    the state ``[B, H, K, V]``, float32.
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
        **options: Any,
    ):
        """Makes the projections.

        Args:
          hidden_dim, key_dim, value_dim, output_dim, num_heads, rngs: as for `Heads`.
          query_scale: factor on the queries.
          **options: ``kernel_init``, ``gate_bias_init``, ``output_norm``, ``output_gate`` and
            ``dtype`` of `Heads`.

        Raises:
          ValueError: num_heads does not divide key_dim and value_dim.
        """
        super().__init__(
            hidden_dim,
            key_dim,
            value_dim,
            output_dim,
            num_heads,
            rngs=rngs,
            forget_gate=True,
            **options,
        )
        self.query_scale = query_scale

    def initial_state(self, batch_size: int) -> HeadState:
        """Zeros ``[B, H, K, V]``, float32."""
        heads = self.num_heads
        return jnp.zeros((batch_size, heads, self.key_dim // heads, self.value_dim // heads))

    def project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """q, k, v, log_gate of ``[..., hidden_dim]`` inputs, each ``[..., H, K or V]``."""
        # Tokens are flattened: the gradient of a matrix then contracts one axis, the fast path.
        flat = x.reshape(-1, x.shape[-1])
        q = self.query_proj(flat) * self.query_scale
        k = jax.nn.sigmoid(self.key_proj(flat))
        log_gate = jax.nn.log_sigmoid(self.gate_proj(flat))
        return (
            self.split_heads(q, x, self.key_dim),
            self.split_heads(k, x, self.key_dim),
            self.split_heads(self.value_proj(flat), x, self.value_dim),
            self.split_heads(log_gate, x, self.key_dim),
        )

    def __call__(self, carry: HeadState, inputs: jax.Array) -> tuple[HeadState, jax.Array]:
        """One token: state ``[B, H, K, V]`` and input ``[B, hidden_dim]`` to the next of each."""
        y, carry = recurrent_step(*self.project(inputs), carry)
        return carry, self.combine(y, inputs)

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
        """Zeros ``[B, H, K, V]``, float32."""
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
                q, k, v, log_gate, initial_state=state, segment_ids=segment_ids
            )
        return self.cell.combine(y, x), state
