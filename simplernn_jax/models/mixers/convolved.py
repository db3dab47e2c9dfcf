"""The layer that mixers of flash-linear-attention (fla) share; each has its own recurrence.

Where implementations differ (initialization, names, constants), these follow
github.com/fla-org/flash-linear-attention, except that the short convolutions start as the identity.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from simplernn_jax.array_types import Activations, LogicalAxes, RecurrentState, SegmentIds
from simplernn_jax.config import ModelConfig, Scalar
from simplernn_jax.models.layers import RMSNorm, ShortConvolution, kernel_init
from simplernn_jax.models.mixers.multi_head import MultiHeadLayer
from simplernn_jax.models.mixers.simple_rnn import check_method
from simplernn_jax.models.mixers.token_mixer import TokenMixer, reject_option
from simplernn_jax.ops.checks import FLOATING, check_array, check_segment_ids
from simplernn_jax.parallel.named_leaves import tuple_with_names
from simplernn_jax.parallel.sequence import sharded_recurrence

OPTIONS: dict[str, Scalar] = {"short_convolution": 0, "method": "auto"}
"""``short_convolution``: width in tokens, the current one included, of the short convolutions of
queries, keys and values; 0 disables them. ``method``: argument of `gated_linear_recurrence`."""


def check_options(config: ModelConfig) -> None:
    """Raise `UserError` for a value of `OPTIONS` that a mixer cannot have."""
    if "method" in config.mixer_options:
        check_method(config)
    width = int(config.mixer_options["short_convolution"])
    if width != 0 and not 2 <= width <= 1024:
        allowed = "0 for none, or from 2 to 1024: a token and earlier ones"
        reject_option("short_convolution", width, allowed)


def dense_options(config: ModelConfig, rngs: nnx.Rngs) -> dict[str, Any]:
    """Return the arguments of the projections of a mixer, which have no biases."""
    dtype = jnp.dtype(config.precision)
    return {"rngs": rngs, "kernel_init": kernel_init(config), "use_bias": False, "dtype": dtype}


_NAMES = ("query", "key", "value")
ConvStates = dict[str, Any]
"""Last inputs of their convolutions, ``[B, width - 1, channels]`` each, with the channels of all
heads."""


@tuple_with_names
class GLAState(NamedTuple):
    """State of a mixer with short convolutions."""

    recurrent: RecurrentState
    """``[B, H, K, V]``, in the state's dtype."""
    convolutions: ConvStates | None
    """None without short convolutions."""


def make_convolutions(
    config: ModelConfig, sizes: Sequence[int], axes: Sequence[str | None], **options: Any
) -> nnx.Dict | None:
    """Return convolutions of queries, keys and values, of these channels; None if disabled."""
    width = int(config.mixer_options["short_convolution"])
    if not width:
        return None
    options["rngs"] = nnx.Rngs(0)  # they draw nothing at random
    shapes = zip(_NAMES, sizes, axes, strict=True)
    return nnx.Dict({n: ShortConvolution(width, size, axis=a, **options) for n, size, a in shapes})


def decay_init(low: float, high: float) -> nnx.Initializer:
    """Return an initializer of ``A_log``: logarithms of uniformly distributed decay rates."""

    def init(key: jax.Array, shape: Any, dtype: Any = jnp.float32, **_: Any) -> jax.Array:
        rates = jax.random.uniform(key, shape, dtype, low, high)
        return jnp.log(jnp.maximum(rates, 1e-3))

    return init


def time_step_init(key: jax.Array, shape: Any, dtype: Any = jnp.float32, **_: Any) -> jax.Array:
    """Initialize ``dt_bias``: softplus of it is log-uniform from 0.001 to 0.1."""
    steps = jnp.exp(jax.random.uniform(key, shape, dtype, math.log(1e-3), math.log(0.1)))
    return steps + jnp.log(-jnp.expm1(-steps))


def decay_logarithm(
    decay_rates_log: jax.Array, dt_bias: jax.Array, dt: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return time steps softplus(dt + dt_bias) and log gates -exp(A_log) steps, ``[B, T, H]``.

    Source: Mamba-2, arXiv:2405.21060.
    """
    rates, bias = (x.astype(dt.dtype)[None, None] for x in (decay_rates_log, dt_bias))
    steps = jax.nn.softplus(dt + bias)
    return steps, -jnp.exp(rates) * steps


class ConvolvedMixer(TokenMixer):
    """A recurrence per head on inputs after short convolutions, each with its own channels.

    A subclass sets the attributes, and implements `project` and `project_outputs`.
    """

    starts_from_zero = True
    hidden_dim: int
    num_heads: int
    key_dim: int
    value_dim: int
    convolutions: nnx.Dict | None
    method: str

    def initial_state(self, batch_size: int) -> GLAState:
        """Return zeros: ``[B, H, K, V]``, and the inputs of convolutions."""
        sizes = self.num_heads, self.key_dim // self.num_heads, self.value_dim // self.num_heads
        recurrent = jnp.zeros((batch_size, *sizes))
        return self._state(recurrent, lambda one: one.initial_state(batch_size))

    def state_axes(self) -> GLAState:
        """Return the logical axes of the arrays of the state."""
        return self._state(LogicalAxes("batch", "heads"), ShortConvolution.state_axes)

    def _state(self, recurrent: Any, of_convolution: Callable[[ShortConvolution], Any]) -> GLAState:
        convolutions = self.convolutions
        if convolutions is None:
            return GLAState(recurrent, None)
        return GLAState(recurrent, {name: of_convolution(convolutions[name]) for name in _NAMES})

    def project(
        self, x: Activations, conv_states: ConvStates | None, segment_ids: SegmentIds | None
    ) -> tuple[tuple[jax.Array, ...], jax.Array | None, ConvStates | None]:
        """Project ``[B, T, hidden_dim]`` to the inputs of the recurrence and of `project_outputs`.

        Returns (q, k, v, log_gate), each ``[B, T, H, K or V]`` float32 (float64 if `dtype` is), the
        pre-activation of the output gate, and the next state of the convolutions, which start from
        zero if `conv_states` is None.
        """
        raise NotImplementedError

    def project_outputs(self, y: jax.Array, output_gate: jax.Array | None) -> jax.Array:
        """Map ``[B, T, H, V]`` and what `project` returned to ``[B, T, hidden_dim]``."""
        raise NotImplementedError

    def convolve(
        self,
        inputs: Iterable[jax.Array],
        conv_states: ConvStates | None,
        segment_ids: SegmentIds | None,
    ) -> tuple[Iterable[jax.Array], ConvStates | None]:
        """Convolve queries, keys and values, ``[B, T, ...]``; return them and the next state."""
        if self.convolutions is None:
            return inputs, None
        outputs, finals = [], {}
        for name, one in zip(_NAMES, inputs, strict=True):
            before = None if conv_states is None else conv_states[name]
            merged = one.reshape(*one.shape[:2], math.prod(one.shape[2:]))
            y, finals[name] = self.convolutions[name](merged, before, segment_ids)
            outputs.append(y.reshape(one.shape))
        return outputs, finals

    def recur(
        self,
        inputs: tuple[jax.Array, ...],
        state: RecurrentState | None,
        segment_ids: SegmentIds | None,
    ) -> tuple[jax.Array, RecurrentState]:
        """Compute the recurrence of what `project` returned: its output, and the state after it."""
        return sharded_recurrence(
            *inputs, initial_state=state, segment_ids=segment_ids, method=self.method
        )

    def __call__(
        self, x: Activations, state: GLAState | None = None, segment_ids: SegmentIds | None = None
    ) -> tuple[Activations, GLAState]:
        """Apply the layer to a sequence; see `TokenMixer`. None is the zero state.

        Raises:
          ValueError: wrong ranks, or shapes inconsistent with each other or with this layer.
          TypeError: wrong dtypes, or the state of another layer.
        """
        sizes = check_array("x", x, "B T D", FLOATING, {"D": self.hidden_dim})
        check_segment_ids(segment_ids, sizes)
        if state is not None and not isinstance(state, GLAState):
            raise TypeError(f"state: expected a GLAState; got {type(state).__name__}")
        recurrent, conv_states = (None, None) if state is None else state
        inputs, output_gate, conv_states = self.project(x, conv_states, segment_ids)
        y, recurrent = self.recur(inputs, recurrent, segment_ids)
        return self.project_outputs(y, output_gate), GLAState(recurrent, conv_states)


class MultiHeadRecurrence(ConvolvedMixer, MultiHeadLayer):
    """The layer that GLA, RetNet, HGRN2 and Gated DeltaNet share; projections have no biases.

    ``conv`` is a `ShortConvolution` with an activation, or the identity::

        q = conv(W_q x)     k = conv(W_k x)     v = conv(W_v x)
        y = W_o concat_heads(scale * norm(recurrence(x, q, k, v)) * silu(W_r x))

    A subclass has the parameters of the recurrence and implements `recurrence_inputs`.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        output_gate: bool = True,
        activation: Callable[[jax.Array], jax.Array] | None = jax.nn.silu,
    ):
        """Initialize the parameters.

        Args:
          config: sizes, precisions and all options; see `ModelConfig`.
          rngs: source of initial values.
          output_gate: multiply by silu(W_r x).
          activation: of the convolutions.

        Raises:
          ValueError: num_heads does not divide key_dim and value_dim.
        """
        widths = (config.hidden_dim, config.key_dim, config.value_dim, config.hidden_dim)
        options = dense_options(config, rngs) | {"output_gate": output_gate}
        super().__init__(*widths, config.num_heads, forget_gate=False, **options)
        self.hidden_dim = config.hidden_dim
        self.head_norm = RMSNorm(config.value_dim // config.num_heads, config.norm_epsilon)
        sizes = (self.key_dim, self.key_dim, self.value_dim)
        self.convolutions = make_convolutions(config, sizes, ["heads"] * 3, activation=activation)
        self.method = str(config.mixer_options.get("method", "auto"))

    def recurrence_inputs(
        self, x: Activations, q: jax.Array, k: jax.Array, v: jax.Array
    ) -> tuple[jax.Array, ...]:
        """Map the layer's input, queries, keys and values to the arguments of `recur`."""
        raise NotImplementedError

    def project(
        self, x: Activations, conv_states: ConvStates | None, segment_ids: SegmentIds | None
    ) -> tuple[tuple[jax.Array, ...], jax.Array | None, ConvStates | None]:
        """See the base class."""
        heads: Iterable[jax.Array]
        heads, output_gate = self.project_inputs(x)
        heads, conv_states = self.convolve(heads, conv_states, segment_ids)
        return self.recurrence_inputs(x, *heads), output_gate, conv_states

    def project_outputs(self, y: jax.Array, output_gate: jax.Array | None) -> jax.Array:
        """Apply the head norm, then gate and project."""
        return MultiHeadLayer.project_outputs(self, self.head_norm(y), output_gate)
