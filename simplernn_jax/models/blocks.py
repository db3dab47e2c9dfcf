"""Layers of the language model: blocks of a token mixer, norms and an MLP."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from simplernn_jax.array_types import Activations, ConvState, SegmentIds
from simplernn_jax.config import ModelConfig
from simplernn_jax.models.layers import (
    Dense,
    RMSNorm,
    ShortConvolution,
    dropout,
    fused_dense,
    kernel_init,
)
from simplernn_jax.models.mixers.token_mixer import TokenMixer, make_mixer
from simplernn_jax.ops.matmul import merge_tokens
from simplernn_jax.ops.rms_norm import rms_norm
from simplernn_jax.parallel.named_leaves import tuple_with_names

CONVOLUTION_WIDTH = 4
"""Width of the short convolution in tokens, the current one included."""


class PlainBlock(nnx.Module):
    """The layer of the original PyTorch implementation (docs/pytorch.md): no norm, no residual.

    Its state is its mixer's; also the base class of the other blocks.
    """

    mixer: TokenMixer

    def __init__(self, config: ModelConfig, mixer: str, *, rngs: nnx.Rngs):
        """Initialize the parameters; `mixer` is the name of a registered one."""
        self.mixer = make_mixer(mixer, config, rngs=rngs)

    def initial_state(self, batch_size: int) -> Any:
        """Return the state before the first token; see `TokenMixer.initial_state`."""
        return self.mixer.initial_state(batch_size)

    def state_axes(self) -> Any:
        """Return the logical axes of the arrays of the state."""
        return self.mixer.state_axes()

    def __call__(
        self,
        x: Activations,
        state: Any | None,
        segment_ids: SegmentIds | None,
        dropout_key: jax.Array | None = None,
    ) -> tuple[Activations, Any]:
        """Apply the block to a sequence.

        Args:
          x: ``[B, T, D]``.
          state: before the first token; None is the initial state.
          segment_ids: ``[B, T]``; a change of id resets the state.
          dropout_key: PRNG key of dropout; None disables it. Plain blocks have none.

        Returns:
          ``[B, T, D]`` float32 and the state after the last token.

        Raises:
          ValueError: wrong ranks, or shapes inconsistent with each other or with this block.
          TypeError: wrong dtypes, or a state of another kind.
        """
        return self.mixer.mix(x, state, segment_ids)


@tuple_with_names
class ResidualState(NamedTuple):
    """State of a `ResidualBlock`."""

    mixer: Any
    convolution: ConvState
    """Past inputs of the short convolution."""


class ResidualBlock(PlainBlock):
    """Pre-norm block: h = x + mixer(conv(norm(x))), then h + MLP(norm(h)).

    A short causal convolution mixes each token with the three before it. The initial std of the
    MLP's last projection is divided by sqrt(2 * num_layers), as in GPT-2; the mixer's is not.
    """

    is_parallel = False

    def __init__(self, config: ModelConfig, mixer: str, *, rngs: nnx.Rngs):
        """Initialize the parameters; `mixer` is the name of a registered one."""
        self.convolution = ShortConvolution(
            CONVOLUTION_WIDTH, config.hidden_dim, rngs=rngs, normalize=True
        )
        super().__init__(config, mixer, rngs=rngs)
        std = 1 / math.sqrt(2 * config.num_layers * config.mlp_dim)
        self.mlp_in = _mlp_in(config, rngs)
        self.mlp_out = _mlp_out(config, rngs, nnx.initializers.normal(std))
        self.dropout_rate = config.dropout

    def initial_state(self, batch_size: int) -> ResidualState:
        """See `PlainBlock`."""
        return ResidualState(
            super().initial_state(batch_size), self.convolution.initial_state(batch_size)
        )

    def state_axes(self) -> ResidualState:
        """See `PlainBlock`."""
        convolution: Any = self.convolution.state_axes()
        return ResidualState(super().state_axes(), convolution)

    def __call__(
        self,
        x: Activations,
        state: ResidualState | None,
        segment_ids: SegmentIds | None,
        dropout_key: jax.Array | None = None,
    ) -> tuple[Activations, ResidualState]:
        """See `PlainBlock`."""
        if state is not None and not isinstance(state, ResidualState):
            raise TypeError(f"state: expected a ResidualState; got {type(state).__name__}")
        keys = (None, None) if dropout_key is None else jax.random.split(dropout_key)
        mixer_state, conv_state = (None, None) if state is None else state
        convolved, conv_state = self.convolution(x, conv_state, segment_ids)
        y, mixer_state = self.mixer.mix(convolved, mixer_state, segment_ids)
        x = x + dropout(y, self.dropout_rate, keys[0])
        hidden = merge_tokens(convolved if self.is_parallel else rms_norm(x))
        (hidden,) = fused_dense(hidden, [self.mlp_in], squared_relu=True)
        y = self.mlp_out(hidden).reshape(x.shape)
        return x + dropout(y, self.dropout_rate, keys[1]), ResidualState(mixer_state, conv_state)


class ParallelBlock(ResidualBlock):
    """Pre-norm block with the mixer beside the MLP: c = conv(norm(x)), then x + mixer(c) + MLP(c).

    Parallel layers (PaLM, arXiv:2204.02311, section 2) of `ResidualBlock`. The MLP too sees the
    tokens before each one, from which a small model learns more per token (docs/notes.md).
    """

    is_parallel = True


class SwiGLUBlock(PlainBlock):
    """Pre-norm block: h = x + mixer(norm(x)), n = norm(h), h + W_down(silu(W_gate n) * W_up n).

    Its MLP is SwiGLU (arXiv:2002.05202). With ``mixer="gla"`` it is the layer of
    flash-linear-attention. With ``mlp_dim=0`` it ends after the mixer, as the layer of Mamba-2.
    """

    def __init__(self, config: ModelConfig, mixer: str, *, rngs: nnx.Rngs):
        """Initialize the parameters; `mixer` is the name of a registered one."""
        self.mixer_norm = RMSNorm(config.hidden_dim, config.norm_epsilon)
        super().__init__(config, mixer, rngs=rngs)
        self.dropout_rate, self.has_mlp = config.dropout, config.mlp_dim > 0
        if not self.has_mlp:
            return
        self.mlp_norm = RMSNorm(config.hidden_dim, config.norm_epsilon)
        self.mlp_gate = _mlp_in(config, rngs)
        self.mlp_up = _mlp_in(config, rngs)
        self.mlp_down = _mlp_out(config, rngs, kernel_init(config))

    def __call__(
        self,
        x: Activations,
        state: Any | None,
        segment_ids: SegmentIds | None,
        dropout_key: jax.Array | None = None,
    ) -> tuple[Activations, Any]:
        """See `PlainBlock`."""
        keys = (None, None) if dropout_key is None else jax.random.split(dropout_key)
        y, state = self.mixer.mix(self.mixer_norm(x), state, segment_ids)
        x = x + dropout(y, self.dropout_rate, keys[0])
        if not self.has_mlp:
            return x, state
        hidden = self.mlp_norm(merge_tokens(x))
        gate, up = fused_dense(hidden, [self.mlp_gate, self.mlp_up])
        y = self.mlp_down(_swiglu(gate, up)).reshape(x.shape)
        return x + dropout(y, self.dropout_rate, keys[1]), state


BLOCKS = {
    "parallel": ParallelBlock,
    "plain": PlainBlock,
    "residual": ResidualBlock,
    "swiglu": SwiGLUBlock,
}
"""By ``model.block``."""


def _mlp_in(config: ModelConfig, rngs: nnx.Rngs) -> Dense:
    sizes = (config.hidden_dim, config.mlp_dim, ("embed", "mlp"))
    init, dtype = kernel_init(config), jnp.dtype(config.precision)
    return Dense(*sizes, rngs=rngs, use_bias=False, kernel_init=init, dtype=dtype)


def _mlp_out(config: ModelConfig, rngs: nnx.Rngs, init: nnx.Initializer | None) -> Dense:
    sizes = (config.mlp_dim, config.hidden_dim, ("mlp", "embed"))
    options: dict[str, Any] = {"row_parallel": True, "use_bias": False, "kernel_init": init}
    return Dense(*sizes, rngs=rngs, dtype=jnp.dtype(config.precision), **options)


@jax.checkpoint  # gate and up are saved in any case; the backward pass recomputes silu
def _swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    return jax.nn.silu(gate) * up
