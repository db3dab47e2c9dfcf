"""SimpleRNN: a Flax RNN cell for one token, and a layer for a sequence."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from simplernn_jax.array_types import Activations, LogicalAxes, Outputs, RecurrentState, SegmentIds
from simplernn_jax.config import ModelConfig
from simplernn_jax.models.mixers.multi_head import MultiHeadLayer, multi_head_options
from simplernn_jax.models.mixers.token_mixer import TokenMixer, register_mixer, reject_option
from simplernn_jax.ops import recurrent_step
from simplernn_jax.ops.checks import FLOATING, accumulator_dtype, check_array, check_segment_ids
from simplernn_jax.ops.gated_linear_recurrence import METHODS, simple_rnn_recurrence
from simplernn_jax.ops.native import supports_native
from simplernn_jax.parallel.collectives import axis_size
from simplernn_jax.parallel.mesh import AXES
from simplernn_jax.parallel.sequence import AXIS as SEQUENCE_AXIS
from simplernn_jax.parallel.sequence import sharded_recurrence

GATE_BIAS_RANGE = (1.0, 6.0)
"""Initial gate biases in normalized blocks, spread over the key channels: half-lives of about 2 to
280 tokens."""


class SimpleRNNCell(MultiHeadLayer, nnx.RNNCellBase):
    """One token of SimpleRNN, for `nnx.RNN` or a custom loop.

    Per head, with K = key_dim / num_heads and V = value_dim / num_heads::

        q = (W_q x + b_q) query_scale     k = sigmoid(W_k x + b_k)
        g = sigmoid(W_g x + b_g)          v = W_v x + b_v
        S' = diag(g) S + k v^T            y = S'^T q

    followed by the output norm, gate and projection of `MultiHeadLayer`. With one head, query scale
    1, no norm and no output gate it is the cell of the original PyTorch implementation
    (docs/pytorch.md). The carry is the state ``[B, H, K, V]``.
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
        """Initialize the projections.

        Args:
          hidden_dim, key_dim, value_dim, output_dim, num_heads, rngs: see the base class.
          query_scale: factor on the queries.
          **options: ``kernel_init``, ``gate_bias_init``, ``output_norm``, ``output_gate``,
            ``use_bias`` and ``dtype`` of the base class.

        Raises:
          ValueError: num_heads does not divide key_dim and value_dim.
        """
        sizes = (hidden_dim, key_dim, value_dim, output_dim, num_heads)
        super().__init__(*sizes, rngs=rngs, forget_gate=True, **options)
        self.query_scale = query_scale

    def project(self, x: jax.Array) -> tuple[tuple[jax.Array, ...], jax.Array | None]:
        """Project ``[..., hidden_dim]`` to the inputs of the recurrence and of `project_outputs`.

        Returns:
          (q, k, v, log_gate), each ``[..., H, K or V]`` float32 (float64 if `dtype` is), and the
          pre-activation of the output gate or None.
        """
        (q, k, v, gate), output_gate = self.project_inputs(x)
        return (q * self.query_scale, jax.nn.sigmoid(k), v, jax.nn.log_sigmoid(gate)), output_gate

    def __call__(
        self, carry: RecurrentState, inputs: jax.Array
    ) -> tuple[RecurrentState, jax.Array]:
        """Map state ``[B, H, K, V]`` and input ``[B, hidden_dim]`` to the next state and output.

        Raises:
          ValueError: wrong ranks, or shapes inconsistent with each other or with this cell.
          TypeError: wrong dtypes.
        """
        check_array("inputs", inputs, "B D", FLOATING, {"D": self.query_proj.in_features})
        (q, k, v, log_gate), output_gate = self.project(inputs)
        accum_dtype = accumulator_dtype(carry)
        y, state = recurrent_step(q, k, v, log_gate, carry.astype(accum_dtype))
        return state.astype(carry.dtype), self.project_outputs(y, output_gate)

    def initialize_carry(
        self, input_shape: tuple[int, ...], rngs: Any = None, carry_init: Any = None
    ) -> RecurrentState:
        """Return the zero state for inputs of shape ``(B, hidden_dim)``; called by `nnx.RNN`."""
        return self.initial_state(input_shape[0])

    @property
    def num_feature_axes(self) -> int:
        """Number of feature axes of the input."""
        return 1


class SimpleRNN(TokenMixer):
    """`SimpleRNNCell` over a sequence, with the recurrence in one operation."""

    starts_from_zero = True

    def __init__(
        self,
        hidden_dim: int,
        key_dim: int,
        value_dim: int,
        output_dim: int,
        num_heads: int = 1,
        *,
        rngs: nnx.Rngs,
        method: str = "auto",
        **options: Any,
    ):
        """Initialize the cell.

        Args:
          hidden_dim, key_dim, value_dim, output_dim, num_heads, rngs: see `SimpleRNNCell`.
          method: argument of `gated_linear_recurrence`.
          **options: the other arguments of `SimpleRNNCell`.

        Raises:
          ValueError: num_heads does not divide key_dim and value_dim.
        """
        self.method = method
        self.cell = SimpleRNNCell(
            hidden_dim, key_dim, value_dim, output_dim, num_heads, rngs=rngs, **options
        )

    def initial_state(self, batch_size: int) -> RecurrentState:
        """Return zeros ``[B, H, K, V]``."""
        return self.cell.initial_state(batch_size)

    def state_axes(self) -> LogicalAxes:
        """Return the logical axes of the state."""
        return LogicalAxes("batch", "heads")

    def __call__(
        self,
        x: Activations,
        state: RecurrentState | None = None,
        segment_ids: SegmentIds | None = None,
    ) -> tuple[Outputs, RecurrentState]:
        """Apply the layer to a sequence: ``[B, T, hidden_dim]`` to ``[B, T, output_dim]``.

        See `TokenMixer`; the state is ``[B, H, K, V]``, and None the zero state.

        Raises:
          ValueError: wrong ranks, or shapes inconsistent with each other or with this layer.
          TypeError: wrong dtypes.
        """
        width = self.cell.query_proj.in_features
        check_segment_ids(segment_ids, check_array("x", x, "B T D", FLOATING, {"D": width}))
        options: Any = {"initial_state": state, "segment_ids": segment_ids, "method": self.method}
        if axis_size(SEQUENCE_AXIS) > 1:
            inputs, output_gate = self.cell.project(x)
            y, state = sharded_recurrence(*inputs, **options)
            return self.cell.project_outputs(y, output_gate), state
        layers: list[Any] = [self.cell.key_proj, self.cell.gate_proj]
        inputs, output_gate = self.cell.project_inputs(x, without_bias=layers)
        biases = [layer.bias[...].reshape(inputs[1].shape[2:]) for layer in layers]
        options["query_scale"] = self.cell.query_scale
        y, state = simple_rnn_recurrence(*inputs, *biases, **options)
        return self.cell.project_outputs(y, output_gate), state


def linspace_gate_bias(num_heads: int) -> nnx.Initializer:
    """Return an initializer: evenly spaced over `GATE_BIAS_RANGE` along the channels of a head."""

    def init(key: jax.Array, shape: Any, dtype: Any = jnp.float32, **_: Any) -> jax.Array:
        per_head = jnp.linspace(*GATE_BIAS_RANGE, shape[-1] // num_heads, dtype=dtype)
        return jnp.tile(per_head, num_heads)

    return init


def check_method(config: ModelConfig) -> None:
    """Raise `UserError` for a ``method`` that `gated_linear_recurrence` does not have here."""
    if (method := config.mixer_options["method"]) not in METHODS:
        reject_option("method", method, f"one of {', '.join(METHODS)}")
    if method == "fused" and not supports_native(jnp.float32):
        reject_option("method", method, "auto here: fused requires a CPU and a C compiler")


@register_mixer("simple_rnn", options={"method": "auto"}, mesh_axes=AXES, check=check_method)
def simple_rnn(config: ModelConfig, *, rngs: nnx.Rngs) -> SimpleRNN:
    """Return the SimpleRNN of a model: the original one in plain blocks.

    In others its queries are scaled by 1/sqrt(K), and it has a norm per head and an output gate, as
    in gated linear attention (arXiv:2312.06635, section 4.4).
    """
    options = multi_head_options(config)
    if config.block != "plain":
        options["query_scale"] = (config.key_dim // config.num_heads) ** -0.5
        options["gate_bias_init"] = linspace_gate_bias(config.num_heads)
    return SimpleRNN(method=str(config.mixer_options["method"]), rngs=rngs, **options)
