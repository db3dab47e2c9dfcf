"""Gated linear attention (GLA): the block of `GLAForCausalLM` of flash-linear-attention.

Source: Yang et al. 2023, arXiv:2312.06635, section 4.4. Where implementations differ
(initialization, names, constants), this one follows github.com/fla-org/flash-linear-attention,
except that the short convolutions start as the identity.
"""

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
from simplernn_jax.config import GATE_RANK, ModelConfig
from simplernn_jax.models.convolution import ShortConvolution
from simplernn_jax.models.layers import Dense, RMSNorm, dropout, fused_dense
from simplernn_jax.models.multi_head import MultiHeadLayer
from simplernn_jax.models.simple_rnn import Recurrence
from simplernn_jax.named_leaves import tuple_with_names
from simplernn_jax.ops import gated_linear_recurrence
from simplernn_jax.ops.checks import FLOATING, check_array, check_segment_ids
from simplernn_jax.ops.matmul import merge_tokens
from simplernn_jax.parallel.sequence import sharded_recurrence

GATE_LOGIT_NORMALIZER = 16
"""Divisor of the forget gates' logarithms; the paper's temperature tau."""

INITIALIZER_STD = 0.02
"""Standard deviation of the initial embeddings and kernels."""


@tuple_with_names
class QKVConvStates(NamedTuple):
    """Last inputs of the convolutions of one layer, or the logical axes of these arrays.

    Arrays are float32 (float64 under x64) ``[B, width - 1, channels]``, with the channels of all
    heads.
    """

    query: ConvState
    key: ConvState
    value: ConvState


@tuple_with_names
class GLAState(NamedTuple):
    """State of `GatedLinearAttention`."""

    recurrent: RecurrentState
    """``[B, H, K, V]``, in the state's dtype."""
    recent: QKVConvStates | None
    """None without short convolutions."""


class QKVConvolutions(nnx.Module):
    """One `ShortConvolution` with silu each for the heads' queries, keys and values."""

    def __init__(self, width: int, key_dim: int, value_dim: int):
        """Initialize the convolutions of `width` tokens, which draw nothing at random."""
        options: dict[str, Any] = {"rngs": nnx.Rngs(0), "activation": jax.nn.silu, "axis": "heads"}
        self.query = ShortConvolution(width, key_dim, **options)
        self.key = ShortConvolution(width, key_dim, **options)
        self.value = ShortConvolution(width, value_dim, **options)

    def initial_state(self, batch_size: int) -> QKVConvStates:
        """Return zeros, ``[B, width - 1, channels]`` each."""
        return QKVConvStates(*(conv.initial_state(batch_size) for conv in self._all()))

    def state_axes(self) -> QKVConvStates:
        """Return the logical axes of the state."""
        axes: Any = [conv.state_axes() for conv in self._all()]
        return QKVConvStates(*axes)

    def __call__(
        self,
        heads: tuple[jax.Array, ...],
        state: QKVConvStates | None,
        segment_ids: SegmentIds | None,
    ) -> tuple[tuple[jax.Array, ...], QKVConvStates]:
        """Convolve queries, keys and values over time, each as `ShortConvolution`.

        Args:
          heads: (q, k, v), ``[B, T, H, K or V]`` each.
          state: inputs before the first token, ``[B, width - 1, H * K or H * V]`` each; None starts
            from zeros.
          segment_ids: ``[B, T]``; inputs of other segments count as zero.

        Returns:
          The three results, ``[B, T, H, K or V]``, and the states after the last token.

        Raises:
          ValueError: shapes inconsistent with each other or with this layer.
          TypeError: wrong dtypes.
        """
        states = (None, None, None) if state is None else state
        outputs, finals = [], []
        for conv, x, before in zip(self._all(), heads, states, strict=True):
            merged = x.reshape(*x.shape[:2], x.shape[2] * x.shape[3])
            y, final = conv(merged, before, segment_ids)
            outputs.append(y.reshape(x.shape))
            finals.append(final)
        return tuple(outputs), QKVConvStates(*finals)

    def _all(self) -> tuple[ShortConvolution, ...]:
        return self.query, self.key, self.value


class GatedLinearAttention(MultiHeadLayer):
    """GLA token mixer; of its projections only `gate_up_proj` has a bias.

    Per head, with K = key_dim / num_heads and V = value_dim / num_heads::

        q = conv(W_q x) / sqrt(K)     k = conv(W_k x)     v = conv(W_v x)
        log g = log_sigmoid(W_2 W_1 x + b) / 16, clamped below at min_log_gate if that is nonzero
        S' = diag(g) S + k v^T
        y = W_o concat_heads(scale * norm(S'^T q) * silu(W_r x))

    W_1 has `GATE_RANK` rows. ``conv`` is a `ShortConvolution` with silu, or the identity.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        recurrence: Recurrence = gated_linear_recurrence,
    ):
        """Initialize the parameters.

        Args:
          config: sizes, precisions, convolution and gate; see `ModelConfig`.
          rngs: source of initial values.
          recurrence: implementation, with the signature of `gated_linear_recurrence`.

        Raises:
          ValueError: num_heads does not divide key_dim and value_dim.
        """
        init = nnx.initializers.normal(INITIALIZER_STD)
        sizes = (config.hidden_dim, config.key_dim, config.value_dim, config.hidden_dim)
        options: dict[str, Any] = {
            "rngs": rngs,
            "kernel_init": init,
            "use_bias": False,
            "dtype": jnp.dtype(config.precision),
        }
        super().__init__(*sizes, config.num_heads, forget_gate=False, output_gate=True, **options)
        self.gate_down_proj = Dense(config.hidden_dim, GATE_RANK, ("embed", None), **options)
        options |= {"use_bias": True, "bias_init": nnx.initializers.zeros_init()}
        self.gate_up_proj = Dense(GATE_RANK, config.key_dim, ("rank", "heads"), **options)
        self.head_norm = RMSNorm(config.value_dim // config.num_heads, config.norm_epsilon)
        width = config.short_convolution
        self.convolutions = (
            QKVConvolutions(width, config.key_dim, config.value_dim) if width else None
        )
        self.min_log_gate = config.min_log_gate
        # None: the default dtype, float32 (float64 under x64).
        state_dtype = jnp.dtype(config.state_precision)
        self.state_dtype = None if state_dtype == jnp.float32 else state_dtype
        self.recurrence = recurrence

    def initial_state(self, batch_size: int) -> GLAState:
        """Return zeros: ``[B, H, K, V]`` in the state dtype, and those of the convolutions."""
        heads = self.num_heads
        shape = (batch_size, heads, self.key_dim // heads, self.value_dim // heads)
        recent = None if self.convolutions is None else self.convolutions.initial_state(batch_size)
        return GLAState(jnp.zeros(shape, self.state_dtype), recent)

    def state_axes(self) -> GLAState:
        """Return the logical axes of the arrays of the state."""
        recurrent: Any = LogicalAxes("batch", "heads")
        recent = None if self.convolutions is None else self.convolutions.state_axes()
        return GLAState(recurrent, recent)

    def project(
        self, x: Activations, recent: QKVConvStates | None, segment_ids: SegmentIds | None
    ) -> tuple[tuple[jax.Array, ...], jax.Array | None, QKVConvStates | None]:
        """Project ``[B, T, hidden_dim]`` to the inputs of the recurrence and of `project_outputs`.

        Returns (q, k, v, log_gate), each ``[B, T, H, K or V]`` float32 (float64 if `dtype` is), the
        pre-activation of the output gate, and the next state of the convolutions, which start from
        zero if `recent` is None.
        """
        heads, output_gate = self.project_inputs(x)
        if self.convolutions is not None:
            heads, recent = self.convolutions(heads, recent, segment_ids)
        q, k, v = heads
        logits = self.gate_up_proj(self.gate_down_proj(x)).reshape(k.shape)
        log_gate = jax.nn.log_sigmoid(logits) / GATE_LOGIT_NORMALIZER
        if self.min_log_gate:
            log_gate = jnp.maximum(log_gate, self.min_log_gate)
        return (q * q.shape[-1] ** -0.5, k, v, log_gate), output_gate, recent

    def project_outputs(self, y: jax.Array, output_gate: jax.Array | None) -> jax.Array:
        """Apply the head norm, then gate and project as the base class.

        Args:
          y: output of the recurrence, ``[..., H, V]``.
          output_gate: pre-activation, ``[..., H * V]``; None leaves the gate out.

        Returns:
          ``[..., hidden_dim]`` float32 (float64 if `dtype` is).
        """
        return super().project_outputs(self.head_norm(y), output_gate)

    def __call__(
        self, x: Activations, state: GLAState | None = None, segment_ids: SegmentIds | None = None
    ) -> tuple[Activations, GLAState]:
        """Apply the layer to a sequence.

        Args:
          x: ``[B, T, hidden_dim]``.
          state: before the first token; None starts from zero.
          segment_ids: ``[B, T]``; a change of id resets the state to zero.

        Returns:
          ``[B, T, hidden_dim]`` and the state after the last token.

        Raises:
          ValueError: wrong ranks, or shapes inconsistent with each other or with this layer.
          TypeError: wrong dtypes, or a state that is not a `GLAState`.
        """
        sizes = check_array("x", x, "B T D", FLOATING, {"D": self.query_proj.in_features})
        check_segment_ids(segment_ids, sizes)
        if state is not None:
            self._check_structure(state)
        recurrent, recent = (None, None) if state is None else state
        inputs, output_gate, recent = self.project(x, recent, segment_ids)
        if state is not None:
            sizes = {"B": x.shape[0], "H": inputs[0].shape[2], "K": inputs[0].shape[3]}
            sizes["V"] = inputs[2].shape[3]
            check_array("state.recurrent", state.recurrent, "B H K V", FLOATING, sizes)
        y, recurrent = sharded_recurrence(
            *inputs,
            initial_state=recurrent,
            segment_ids=segment_ids,
            state_dtype=self.state_dtype,
            recurrence=self.recurrence,
        )
        return self.project_outputs(y, output_gate), GLAState(recurrent, recent)

    def _check_structure(self, state: Any) -> None:
        if not isinstance(state, GLAState):
            raise TypeError(f"state: expected a GLAState; got {type(state).__name__}")
        if (state.recent is None) != (self.convolutions is None):
            expected = "None" if self.convolutions is None else "QKVConvStates"
            found = type(state.recent).__name__
            raise TypeError(f"state.recent: expected {expected}; got {found}")


class GLABlock(nnx.Module):
    """Pre-norm block: h = x + mixer(norm(x)), n = norm(h), h + W_down(silu(W_gate n) * W_up n).

    The MLP is SwiGLU (arXiv:2002.05202).
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        recurrence: Recurrence = gated_linear_recurrence,
    ):
        """Initialize the parameters."""
        self.mixer_norm = RMSNorm(config.hidden_dim, config.norm_epsilon)
        self.mixer = GatedLinearAttention(config, rngs=rngs, recurrence=recurrence)
        self.mlp_norm = RMSNorm(config.hidden_dim, config.norm_epsilon)
        options: dict[str, Any] = {
            "rngs": rngs,
            "kernel_init": nnx.initializers.normal(INITIALIZER_STD),
            "use_bias": False,
            "dtype": jnp.dtype(config.precision),
        }
        sizes = (config.hidden_dim, config.mlp_dim, ("embed", "mlp"))
        self.mlp_gate = Dense(*sizes, **options)
        self.mlp_up = Dense(*sizes, **options)
        self.mlp_down = Dense(
            config.mlp_dim, config.hidden_dim, ("mlp", "embed"), row_parallel=True, **options
        )
        self.dropout_rate = config.dropout

    def initial_state(self, batch_size: int) -> GLAState:
        """Return the zero state of the mixer."""
        return self.mixer.initial_state(batch_size)

    def state_axes(self) -> GLAState:
        """Return the logical axes of the arrays of the state."""
        return self.mixer.state_axes()

    def __call__(
        self,
        x: Activations,
        state: GLAState | None,
        segment_ids: SegmentIds | None,
        dropout_key: jax.Array | None = None,
    ) -> tuple[Activations, GLAState]:
        """Apply the block to a sequence.

        Args:
          x: ``[B, T, hidden_dim]``.
          state: before the first token; None starts from zero.
          segment_ids: ``[B, T]``; a change of id resets the state to zero.
          dropout_key: PRNG key of dropout; None disables it.

        Returns:
          ``[B, T, hidden_dim]`` float32 and the state after the last token.

        Raises:
          ValueError: wrong ranks, or a state or segment ids inconsistent with `x` or this block.
          TypeError: wrong dtypes, or a state that is not a `GLAState`.
        """
        keys = (None, None) if dropout_key is None else jax.random.split(dropout_key)
        y, state = self.mixer(self.mixer_norm(x), state, segment_ids)
        x = x + dropout(y, self.dropout_rate, keys[0])
        hidden = self.mlp_norm(merge_tokens(x))
        gate, up = fused_dense(hidden, [self.mlp_gate, self.mlp_up])
        y = self.mlp_down(_swiglu(gate, up)).reshape(x.shape)
        return x + dropout(y, self.dropout_rate, keys[1]), state


@jax.checkpoint  # gate and up are saved in any case; the backward pass recomputes silu
def _swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    return jax.nn.silu(gate) * up
