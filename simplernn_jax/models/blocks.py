"""Layers of the language model."""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from simplernn_jax.array_types import (
    Activations,
    ConvState,
    LogicalAxes,
    RecurrentState,
    SegmentIds,
)
from simplernn_jax.config import ModelConfig
from simplernn_jax.models.attention import Attention, KVCache
from simplernn_jax.models.convolution import ShortConvolution
from simplernn_jax.models.layers import Dense, dropout
from simplernn_jax.models.simple_rnn import Recurrence, SimpleRNN
from simplernn_jax.named_leaves import tuple_with_names
from simplernn_jax.ops import gated_linear_recurrence
from simplernn_jax.ops.checks import FLOATING, check_array
from simplernn_jax.ops.matmul import merge_tokens
from simplernn_jax.ops.rms_norm import rms_norm

GATE_BIAS_RANGE = (1.0, 6.0)
"""Initial gate biases of the residual block, spread over the key channels: half-lives of about 2 to
280 tokens."""

CONVOLUTION_WIDTH = 4
"""Width of the residual block's short convolution in tokens, the current one included."""


def linspace_gate_bias(num_heads: int) -> nnx.Initializer:
    """Return an initializer: evenly spaced over `GATE_BIAS_RANGE` along the channels of a head."""

    def init(key: jax.Array, shape: Any, dtype: Any = jnp.float32, **_: Any) -> jax.Array:
        per_head = jnp.linspace(*GATE_BIAS_RANGE, shape[-1] // num_heads, dtype=dtype)
        return jnp.tile(per_head, num_heads)

    return init


def _mixer_options(config: ModelConfig) -> dict[str, Any]:
    """Return the arguments that all mixers of the residual stream share."""
    return {
        "hidden_dim": config.hidden_dim,
        "key_dim": config.key_dim,
        "value_dim": config.value_dim,
        "output_dim": config.hidden_dim,
        "num_heads": config.num_heads,
        "dtype": jnp.dtype(config.precision),
    }


class PlainBlock(nnx.Module):
    """The layer of the original PyTorch implementation (docs/pytorch.md): no norm, no residual."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        recurrence: Recurrence = gated_linear_recurrence,
    ):
        self.mixer = SimpleRNN(
            **_mixer_options(config),
            state_dtype=jnp.dtype(config.state_precision),
            rngs=rngs,
            recurrence=recurrence,
        )

    def initial_state(self, batch_size: int) -> RecurrentState:
        """Return zeros ``[B, H, K, V]`` in the state dtype."""
        return self.mixer.initial_state(batch_size)

    def state_axes(self) -> LogicalAxes:
        """Return the logical axes of the state."""
        return self.mixer.state_axes()

    def __call__(
        self,
        x: Activations,
        state: RecurrentState | None,
        segment_ids: SegmentIds | None,
        dropout_key: jax.Array | None = None,
    ) -> tuple[Activations, RecurrentState]:
        """Apply the layer to a sequence.

        Args:
          x: ``[B, T, D]``.
          state: ``[B, H, K, V]`` before the first token; None starts from zero.
          segment_ids: ``[B, T]``; a change of id resets the state to zero.
          dropout_key: ignored.

        Returns:
          ``[B, T, D]`` float32 and the state after the last token.

        Raises:
          ValueError: wrong ranks, or shapes inconsistent with each other or with this layer.
          TypeError: wrong dtypes.
        """
        return self.mixer(x, state, segment_ids)


@tuple_with_names
class ResidualState(NamedTuple):
    """State of a `ResidualBlock`."""

    mixer: RecurrentState | KVCache
    recent: ConvState
    """State of the short convolution."""


class ResidualBlock(nnx.Module):
    """Pre-norm block: h = x + mixer(conv(norm(x))), then h + MLP(norm(h)).

    A short causal convolution mixes each token with the three before it. The mixer is a `SimpleRNN`
    with queries scaled by 1/sqrt(K), or `Attention`; both are multi-head, with per-head RMS norm
    and an output gate (as in gated linear attention, arXiv:2312.06635, section 4.4). The initial
    std of the MLP's last projection is divided by sqrt(2 * num_layers), as in GPT-2, but not that
    of the mixer's.
    """

    def __init__(
        self,
        config: ModelConfig,
        mixer: str,
        *,
        rngs: nnx.Rngs,
        recurrence: Recurrence = gated_linear_recurrence,
    ):
        """Initialize the parameters; `mixer` is one of `config.MIXERS`."""
        kernel_init = nnx.initializers.normal(1 / math.sqrt(config.hidden_dim))
        common: dict[str, Any] = {"rngs": rngs, "kernel_init": kernel_init, "use_bias": False}
        options = {**_mixer_options(config), **common, "output_norm": True, "output_gate": True}
        self.convolution = ShortConvolution(
            CONVOLUTION_WIDTH, config.hidden_dim, rngs=rngs, normalize=True
        )
        if mixer == "attention":
            self.mixer: SimpleRNN | Attention = Attention(
                context=config.attention_context, **options
            )
        else:
            self.mixer = SimpleRNN(
                state_dtype=jnp.dtype(config.state_precision),
                query_scale=(config.key_dim // config.num_heads) ** -0.5,
                gate_bias_init=linspace_gate_bias(config.num_heads),
                recurrence=recurrence,
                **options,
            )
        common["dtype"] = jnp.dtype(config.precision)
        self.mlp_in = Dense(config.hidden_dim, config.mlp_dim, ("embed", "mlp"), **common)
        std = 1 / math.sqrt(2 * config.num_layers * config.mlp_dim)
        common |= {"kernel_init": nnx.initializers.normal(std), "row_parallel": True}
        self.mlp_out = Dense(config.mlp_dim, config.hidden_dim, ("mlp", "embed"), **common)
        self.dropout_rate = config.dropout

    def initial_state(self, batch_size: int) -> ResidualState:
        """Return the zero state of mixer and convolution."""
        return ResidualState(
            self.mixer.initial_state(batch_size), self.convolution.initial_state(batch_size)
        )

    def state_axes(self) -> ResidualState:
        """Return the logical axes of the arrays of the state."""
        mixer: Any = self.mixer.state_axes()
        recent: Any = self.convolution.state_axes()
        return ResidualState(mixer, recent)

    def __call__(
        self,
        x: Activations,
        state: ResidualState | None,
        segment_ids: SegmentIds | None,
        dropout_key: jax.Array | None = None,
    ) -> tuple[Activations, ResidualState]:
        """Apply the block to a sequence.

        Args:
          x: ``[B, T, D]``.
          state: before the first token; None starts from zero.
          segment_ids: ``[B, T]``; a change of id resets the state to zero.
          dropout_key: PRNG key of dropout; None disables it.

        Returns:
          ``[B, T, D]`` float32 and the state after the last token.

        Raises:
          ValueError: wrong ranks, or shapes inconsistent with each other or with this block.
          TypeError: wrong dtypes, or a state that is not a `ResidualState`.
        """
        check_array("x", x, "B T D", FLOATING, {"D": self.convolution.features})
        if state is not None and not isinstance(state, ResidualState):
            raise TypeError(f"state: expected a ResidualState; got {type(state).__name__}")
        keys = (None, None) if dropout_key is None else jax.random.split(dropout_key)
        mixer_state: Any
        mixer_state, recent = (None, None) if state is None else state
        y, recent = self.convolution(x, recent, segment_ids)
        y, mixer_state = self.mixer(y, mixer_state, segment_ids)
        x = x + dropout(y, self.dropout_rate, keys[0])
        hidden = merge_tokens(rms_norm(x))
        y = self.mlp_out(_squared_relu(self.mlp_in(hidden), self.mlp_out.dtype)).reshape(x.shape)
        return x + dropout(y, self.dropout_rate, keys[1]), ResidualState(mixer_state, recent)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _squared_relu(x: jax.Array, dtype: Any) -> jax.Array:
    """``max(x, 0)^2`` (Primer, arXiv:2109.08668, section 4.1) in `dtype`.

    Its gradient, ``2 max(x, 0)``, is 2 sqrt(y); y is already a residual of the next matmul, so
    relu(x), the widest activation of a layer, need not be saved.
    """
    # Not jnp.square: XLA would simplify sqrt(square(relu(x))), and keep relu(x) for the gradient.
    return (x * jax.nn.relu(x)).astype(dtype)


@_squared_relu.defjvp
def _squared_relu_jvp(dtype: Any, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (x,), (tangent,) = primals, tangents
    y = _squared_relu(x, dtype)
    return y, _squared_relu_tangent(y, tangent)


@partial(jax.checkpoint, prevent_cse=False)
def _squared_relu_tangent(y: jax.Array, tangent: jax.Array) -> jax.Array:
    return (2 * _safe_sqrt(y.astype(tangent.dtype)) * tangent).astype(y.dtype)


@jax.custom_jvp
def _safe_sqrt(y: jax.Array) -> jax.Array:
    return jnp.sqrt(y)


@_safe_sqrt.defjvp
def _safe_sqrt_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    root = jnp.sqrt(primals[0])
    # Where y is 0, so is the derivative of relu(x).
    return root, jnp.where(root > 0, tangents[0] / jnp.where(root > 0, 2 * root, 1), 0)
