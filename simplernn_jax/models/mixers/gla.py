"""Gated linear attention (GLA): the mixer of `GLAForCausalLM` of flash-linear-attention.

Source: Yang et al. 2023, arXiv:2312.06635, section 4.4. Where implementations differ
(initialization, names, constants), this one follows github.com/fla-org/flash-linear-attention,
except that the short convolutions start as the identity.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from simplernn_jax.array_types import Activations, LogicalAxes, RecurrentState, SegmentIds
from simplernn_jax.config import ModelConfig, Scalar
from simplernn_jax.models.layers import Dense, RMSNorm, ShortConvolution, kernel_init
from simplernn_jax.models.mixers.multi_head import MultiHeadLayer
from simplernn_jax.models.mixers.simple_rnn import check_method
from simplernn_jax.models.mixers.token_mixer import TokenMixer, register_mixer, reject_option
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


_CONVOLVED = ("query", "key", "value")
ConvStates = dict[str, Any]
"""Last inputs of their convolutions, ``[B, width - 1, channels]`` each, with the channels of all
heads."""


@tuple_with_names
class GLAState(NamedTuple):
    """State of `GatedLinearAttention`."""

    recurrent: RecurrentState
    """``[B, H, K, V]``, in the state's dtype."""
    convolutions: ConvStates | None
    """None without short convolutions."""


@register_mixer("gla", options=OPTIONS, mesh_axes=AXES, check=_check)
class GatedLinearAttention(MultiHeadLayer, TokenMixer):
    """GLA token mixer; of its projections only `gate_up_proj` has a bias.

    Per head, with K = key_dim / num_heads and V = value_dim / num_heads::

        q = conv(W_q x) / sqrt(K)     k = conv(W_k x)     v = conv(W_v x)
        log g = log_sigmoid(W_2 W_1 x + b) / 16, clamped below at min_log_gate if that is nonzero
        S' = diag(g) S + k v^T
        y = W_o concat_heads(scale * norm(S'^T q) * silu(W_r x))

    W_1 has `GATE_RANK` rows. ``conv`` is a `ShortConvolution` with silu, or the identity.
    """

    starts_from_zero = True

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        """Initialize the parameters.

        Args:
          config: sizes, precisions and all `OPTIONS`; see `ModelConfig`.
          rngs: source of initial values.

        Raises:
          ValueError: num_heads does not divide key_dim and value_dim.
        """
        widths = (config.hidden_dim, config.key_dim, config.value_dim, config.hidden_dim)
        options: dict[str, Any] = {
            "rngs": rngs,
            "kernel_init": kernel_init(config),
            "use_bias": False,
            "dtype": jnp.dtype(config.precision),
        }
        super().__init__(*widths, config.num_heads, forget_gate=False, output_gate=True, **options)
        self.gate_down_proj = Dense(config.hidden_dim, GATE_RANK, ("embed", None), **options)
        options |= {"use_bias": True, "bias_init": nnx.initializers.zeros_init()}
        self.gate_up_proj = Dense(GATE_RANK, config.key_dim, ("rank", "heads"), **options)
        self.head_norm = RMSNorm(config.value_dim // config.num_heads, config.norm_epsilon)
        width = int(config.mixer_options["short_convolution"])
        # They draw nothing at random.
        shared: dict[str, Any] = {"rngs": nnx.Rngs(0), "activation": jax.nn.silu, "axis": "heads"}
        sizes = zip(_CONVOLVED, (self.key_dim, self.key_dim, self.value_dim), strict=True)
        convolutions = {n: ShortConvolution(width, size, **shared) for n, size in sizes if width}
        self.convolutions = nnx.Dict(convolutions) if width else None
        self.min_log_gate = float(config.mixer_options["min_log_gate"])
        self.method = str(config.mixer_options["method"])

    def initial_state(self, batch_size: int) -> GLAState:
        """Return zeros: ``[B, H, K, V]``, and the inputs of convolutions."""
        return self._state(
            super().initial_state(batch_size),
            lambda convolution: convolution.initial_state(batch_size),
        )

    def state_axes(self) -> GLAState:
        """Return the logical axes of the arrays of the state."""
        return self._state(LogicalAxes("batch", "heads"), ShortConvolution.state_axes)

    def _state(self, recurrent: Any, of_convolution: Callable[[ShortConvolution], Any]) -> GLAState:
        if self.convolutions is None:
            return GLAState(recurrent, None)
        return GLAState(recurrent, {n: of_convolution(self.convolutions[n]) for n in _CONVOLVED})

    def project(
        self, x: Activations, conv_states: ConvStates | None, segment_ids: SegmentIds | None
    ) -> tuple[tuple[jax.Array, ...], jax.Array | None, ConvStates | None]:
        """Project ``[B, T, hidden_dim]`` to the inputs of the recurrence and of `project_outputs`.

        Returns (q, k, v, log_gate), each ``[B, T, H, K or V]`` float32 (float64 if `dtype` is), the
        pre-activation of the output gate, and the next state of the convolutions, which start from
        zero if `conv_states` is None.
        """
        heads, output_gate = self.project_inputs(x)
        if self.convolutions is not None:
            convolved, finals = [], {}
            for name, one in zip(_CONVOLVED, heads, strict=True):
                before = None if conv_states is None else conv_states[name]
                merged = one.reshape(*one.shape[:2], one.shape[2] * one.shape[3])
                y, finals[name] = self.convolutions[name](merged, before, segment_ids)
                convolved.append(y.reshape(one.shape))
            heads, conv_states = tuple(convolved), finals
        q, k, v = heads
        logits = self.gate_up_proj(self.gate_down_proj(x)).reshape(k.shape)
        log_gate = jax.nn.log_sigmoid(logits) / GATE_LOGIT_NORMALIZER
        if self.min_log_gate:
            log_gate = jnp.maximum(log_gate, self.min_log_gate)
        return (q * q.shape[-1] ** -0.5, k, v, log_gate), output_gate, conv_states

    def project_outputs(self, y: jax.Array, output_gate: jax.Array | None) -> jax.Array:
        """Apply the head norm, then gate and project as the base class."""
        return super().project_outputs(self.head_norm(y), output_gate)

    def __call__(
        self, x: Activations, state: GLAState | None = None, segment_ids: SegmentIds | None = None
    ) -> tuple[Activations, GLAState]:
        """Apply the layer to a sequence; see `TokenMixer`. None is the zero state.

        Raises:
          ValueError: wrong ranks, or shapes inconsistent with each other or with this layer.
          TypeError: wrong dtypes, or the state of another layer.
        """
        sizes = check_array("x", x, "B T D", FLOATING, {"D": self.query_proj.in_features})
        check_segment_ids(segment_ids, sizes)
        if state is not None and not isinstance(state, GLAState):
            raise TypeError(f"state: expected a GLAState; got {type(state).__name__}")
        recurrent, conv_states = (None, None) if state is None else state
        inputs, output_gate, conv_states = self.project(x, conv_states, segment_ids)
        y, recurrent = sharded_recurrence(
            *inputs, initial_state=recurrent, segment_ids=segment_ids, method=self.method
        )
        return self.project_outputs(y, output_gate), GLAState(recurrent, conv_states)
