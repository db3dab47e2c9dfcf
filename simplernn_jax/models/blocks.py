"""What one layer of the language model is made of."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from simplernn_jax.array_types import Activations, HeadState, RecentInputs, SegmentIds
from simplernn_jax.config import ModelConfig
from simplernn_jax.models.dense import dense, dtypes_of
from simplernn_jax.models.short_convolution import ShortConvolution
from simplernn_jax.models.simple_rnn import SimpleRNN
from simplernn_jax.parallel.collectives import vary

GATE_BIAS_RANGE = (1.0, 6.0)
"""Gate biases of the residual block, spread over the key channels: half-lives of about 2 to 280
tokens at the start."""

CONVOLUTION_WIDTH = 4
"""Tokens that the short convolution of the residual block sees, the current one included."""


def spread_gate_bias(num_heads: int) -> nnx.Initializer:
    """Biases from `GATE_BIAS_RANGE`, evenly over the channels of every head."""

    def init(key: jax.Array, shape: Any, dtype: Any = jnp.float32, **_: Any) -> jax.Array:
        del key
        per_head = jnp.linspace(*GATE_BIAS_RANGE, shape[-1] // num_heads, dtype=dtype)
        return jnp.tile(per_head, num_heads)

    return init


def _recurrence(config: ModelConfig, rngs: nnx.Rngs, **options: Any) -> SimpleRNN:
    """The recurrence of a block, from and to the width of the stack."""
    return SimpleRNN(
        config.hidden_dim,
        config.key_dim,
        config.value_dim,
        config.hidden_dim,
        config.num_heads,
        rngs=rngs,
        dtype=dtypes_of(config).compute,
        state_dtype=dtypes_of(config).state,
        **options,
    )


class PlainBlock(nnx.Module):
    """The bare layer of the PyTorch project: no norm, no residual, its initialisation."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.rnn = _recurrence(config, rngs)

    def initial_state(self, batch_size: int) -> HeadState:
        """The layer's zero state."""
        return self.rnn.initial_state(batch_size)

    def __call__(
        self,
        x: Activations,
        state: HeadState | None,
        segment_ids: SegmentIds | None,
        dropout_key: jax.Array | None = None,
    ) -> tuple[Activations, HeadState]:
        """``[B, T, D]`` to the same shape; the key is not used."""
        return self.rnn(vary(x, "tensor"), state, segment_ids)


class ResidualState(NamedTuple):
    """State of a `ResidualBlock`."""

    recurrence: HeadState
    recent: RecentInputs
    """Of the short convolution."""


class ResidualBlock(nnx.Module):
    """Pre-norm block: x + SimpleRNN(conv(norm(x))), then x + MLP(norm(x)).

    A short causal convolution lets a token see the three before it. The recurrence has heads,
    queries scaled by 1/sqrt(K), a norm on every head's output and an output gate (as in gated
    linear attention, arXiv:2312.06635, section 4.4). What writes into the residual stream starts
    smaller by sqrt(2 * num_layers), as in GPT-2.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        dtype = dtypes_of(config).compute
        kernel_init = nnx.initializers.normal(1 / math.sqrt(config.hidden_dim))
        self.rnn_norm = nnx.RMSNorm(config.hidden_dim, rngs=rngs)
        self.convolution = ShortConvolution(CONVOLUTION_WIDTH, config.hidden_dim, rngs=rngs)
        self.rnn = _recurrence(
            config,
            rngs,
            query_scale=(config.key_dim // config.num_heads) ** -0.5,
            kernel_init=kernel_init,
            gate_bias_init=spread_gate_bias(config.num_heads),
            output_norm=True,
            output_gate=True,
        )
        self.mlp_norm = nnx.RMSNorm(config.hidden_dim, rngs=rngs)
        zeros = nnx.initializers.zeros_init()
        self.mlp_in = dense(
            config.hidden_dim,
            config.mlp_dim,
            rngs=rngs,
            dtype=dtype,
            kernel_init=kernel_init,
            bias_init=zeros,
        )
        self.mlp_out = dense(
            config.mlp_dim,
            config.hidden_dim,
            rngs=rngs,
            dtype=dtype,
            kernel_init=nnx.initializers.normal(
                1 / math.sqrt(2 * config.num_layers * config.mlp_dim)
            ),
            bias_init=zeros,
        )
        self.dropout = nnx.Dropout(config.dropout)

    def initial_state(self, batch_size: int) -> ResidualState:
        """The zero state of recurrence and convolution."""
        return ResidualState(
            self.rnn.initial_state(batch_size), self.convolution.initial_state(batch_size)
        )

    def __call__(
        self,
        x: Activations,
        state: ResidualState | None,
        segment_ids: SegmentIds | None,
        dropout_key: jax.Array | None = None,
    ) -> tuple[Activations, ResidualState]:
        """``[B, T, D]`` float32 to the same; without a key nothing is dropped."""
        keys = (None, None) if dropout_key is None else jax.random.split(dropout_key)
        recurrence, recent = (None, None) if state is None else state
        y, recent = self.convolution(self.rnn_norm(x), recent, segment_ids)
        # Where heads and MLP lie apart, `vary` is where the gradients of their parts are summed:
        # once for all projections.
        y, recurrence = self.rnn(vary(y, "tensor"), recurrence, segment_ids)
        x = x + self._drop(y, keys[0])
        hidden = vary(self.mlp_norm(x), "tensor").reshape(-1, x.shape[-1])
        # The gradient computes GELU again: its intermediate values are the largest of the model.
        y = self.mlp_out(jax.checkpoint(jax.nn.gelu)(self.mlp_in(hidden))).reshape(x.shape)
        return x + self._drop(y, keys[1]), ResidualState(recurrence, recent)

    def _drop(self, y: jax.Array, key: jax.Array | None) -> jax.Array:
        return self.dropout(y, deterministic=key is None, rngs=key)
