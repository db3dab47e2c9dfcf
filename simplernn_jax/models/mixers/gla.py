"""Gated linear attention (GLA): the mixer of `GLAForCausalLM` of flash-linear-attention.

Source: Yang et al. 2023, arXiv:2312.06635, section 4.4. Where implementations differ
(initialization, names, constants), this one follows github.com/fla-org/flash-linear-attention,
except that the short convolutions start as the identity.
"""

import math
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
from simplernn_jax.config import ModelConfig, Scalar
from simplernn_jax.models.convolution import ShortConvolution
from simplernn_jax.models.layers import Dense, RMSNorm, kernel_init
from simplernn_jax.models.mixers.multi_head import MultiHeadLayer
from simplernn_jax.models.mixers.simple_rnn import check_method
from simplernn_jax.models.mixers.token_mixer import ZeroStateMixer, register_mixer, reject_option
from simplernn_jax.ops.checks import FLOATING, check_array, check_segment_ids
from simplernn_jax.parallel.mesh import AXES
from simplernn_jax.parallel.named_leaves import tuple_with_names
from simplernn_jax.parallel.sequence import sharded_recurrence

GATE_LOGIT_NORMALIZER = 16
"""Divisor of the forget gates' logarithms; the paper's temperature tau."""

GATE_RANK = 16
"""Rank of the projection to forget gates."""

OPTIONS: dict[str, Scalar] = {"min_log_gate": 0.0, "short_convolution": 0, "method": "auto"}
"""``min_log_gate``: lower bound of the logarithms of forget gates, negative; 0 disables it.
``short_convolution``: width in tokens, the current one included, of the short convolutions of
queries, keys and values; 0 disables them. ``method``: argument of `gated_linear_recurrence`."""


def _check(config: ModelConfig) -> None:
    check_method(config)
    floor = float(config.mixer_options["min_log_gate"])
    width = int(config.mixer_options["short_convolution"])
    if not -math.inf < floor <= 0:
        reject_option("min_log_gate", floor, "negative, or 0 for no lower bound: gates are below 1")
    if width != 0 and not 2 <= width <= 1024:
        allowed = "0 for none, or from 2 to 1024: a token and earlier ones"
        reject_option("short_convolution", width, allowed)


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
    convolutions: QKVConvStates | None
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


@register_mixer("gla", options=OPTIONS, mesh_axes=AXES, check=_check)
class GatedLinearAttention(MultiHeadLayer, ZeroStateMixer):
    """GLA token mixer; of its projections only `gate_up_proj` has a bias.

    Per head, with K = key_dim / num_heads and V = value_dim / num_heads::

        q = conv(W_q x) / sqrt(K)     k = conv(W_k x)     v = conv(W_v x)
        log g = log_sigmoid(W_2 W_1 x + b) / 16, clamped below at min_log_gate if that is nonzero
        S' = diag(g) S + k v^T
        y = W_o concat_heads(scale * norm(S'^T q) * silu(W_r x))

    W_1 has `GATE_RANK` rows. ``conv`` is a `ShortConvolution` with silu, or the identity.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        """Initialize the parameters.

        Args:
          config: sizes, precisions and all `OPTIONS`; see `ModelConfig`.
          rngs: source of initial values.

        Raises:
          ValueError: num_heads does not divide key_dim and value_dim.
        """
        sizes = (config.hidden_dim, config.key_dim, config.value_dim, config.hidden_dim)
        options: dict[str, Any] = {
            "rngs": rngs,
            "kernel_init": kernel_init(config),
            "use_bias": False,
            "dtype": jnp.dtype(config.precision),
        }
        super().__init__(*sizes, config.num_heads, forget_gate=False, output_gate=True, **options)
        self.gate_down_proj = Dense(config.hidden_dim, GATE_RANK, ("embed", None), **options)
        options |= {"use_bias": True, "bias_init": nnx.initializers.zeros_init()}
        self.gate_up_proj = Dense(GATE_RANK, config.key_dim, ("rank", "heads"), **options)
        self.head_norm = RMSNorm(config.value_dim // config.num_heads, config.norm_epsilon)
        width = int(config.mixer_options["short_convolution"])
        self.convolutions = (
            QKVConvolutions(width, config.key_dim, config.value_dim) if width else None
        )
        self.min_log_gate = float(config.mixer_options["min_log_gate"])
        # None: the default dtype, float32 (float64 under x64).
        state_dtype = jnp.dtype(config.state_precision)
        self.state_dtype = None if state_dtype == jnp.float32 else state_dtype
        self.method = str(config.mixer_options["method"])

    def initial_state(self, batch_size: int) -> GLAState:
        """Return zeros: ``[B, H, K, V]`` in the state dtype, and those of the convolutions."""
        heads = self.num_heads
        shape = (batch_size, heads, self.key_dim // heads, self.value_dim // heads)
        conv = None if self.convolutions is None else self.convolutions.initial_state(batch_size)
        return GLAState(jnp.zeros(shape, self.state_dtype), conv)

    def state_axes(self) -> GLAState:
        """Return the logical axes of the arrays of the state."""
        recurrent: Any = LogicalAxes("batch", "heads")
        conv = None if self.convolutions is None else self.convolutions.state_axes()
        return GLAState(recurrent, conv)

    def project(
        self, x: Activations, conv_states: QKVConvStates | None, segment_ids: SegmentIds | None
    ) -> tuple[tuple[jax.Array, ...], jax.Array | None, QKVConvStates | None]:
        """Project ``[B, T, hidden_dim]`` to the inputs of the recurrence and of `project_outputs`.

        Returns (q, k, v, log_gate), each ``[B, T, H, K or V]`` float32 (float64 if `dtype` is), the
        pre-activation of the output gate, and the next state of the convolutions, which start from
        zero if `conv_states` is None.
        """
        heads, output_gate = self.project_inputs(x)
        if self.convolutions is not None:
            heads, conv_states = self.convolutions(heads, conv_states, segment_ids)
        q, k, v = heads
        logits = self.gate_up_proj(self.gate_down_proj(x)).reshape(k.shape)
        log_gate = jax.nn.log_sigmoid(logits) / GATE_LOGIT_NORMALIZER
        if self.min_log_gate:
            log_gate = jnp.maximum(log_gate, self.min_log_gate)
        return (q * q.shape[-1] ** -0.5, k, v, log_gate), output_gate, conv_states

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
        recurrent, conv_states = (None, None) if state is None else state
        inputs, output_gate, conv_states = self.project(x, conv_states, segment_ids)
        if state is not None:
            sizes = {"B": x.shape[0], "H": inputs[0].shape[2], "K": inputs[0].shape[3]}
            sizes["V"] = inputs[2].shape[3]
            check_array("state.recurrent", state.recurrent, "B H K V", FLOATING, sizes)
        y, recurrent = sharded_recurrence(
            *inputs, initial_state=recurrent, segment_ids=segment_ids, method=self.method
        )
        if self.state_dtype is not None:
            recurrent = recurrent.astype(self.state_dtype)
        return self.project_outputs(y, output_gate), GLAState(recurrent, conv_states)

    def _check_structure(self, state: Any) -> None:
        if not isinstance(state, GLAState):
            raise TypeError(f"state: expected a GLAState; got {type(state).__name__}")
        if (state.convolutions is None) != (self.convolutions is None):
            expected = "None" if self.convolutions is None else "QKVConvStates"
            found = type(state.convolutions).__name__
            raise TypeError(f"state.convolutions: expected {expected}; got {found}")
