"""Input projections, per-head norm, output gate and output projection of the token mixers."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from simplernn_jax.config import ModelConfig
from simplernn_jax.models.layers import Dense, fused_dense, kernel_init
from simplernn_jax.ops.rms_norm import apply_gate, gated_rms_norm, rms_norm


def multi_head_options(config: ModelConfig) -> dict[str, Any]:
    """Return the constructor arguments of a mixer of this model.

    Outside of plain blocks there are no biases, but a norm per head and an output gate.
    """
    options: dict[str, Any] = {
        "hidden_dim": config.hidden_dim,
        "key_dim": config.key_dim,
        "value_dim": config.value_dim,
        "output_dim": config.hidden_dim,
        "num_heads": config.num_heads,
        "kernel_init": kernel_init(config),
        "dtype": jnp.dtype(config.precision),
    }
    if config.block != "plain":
        options |= {"use_bias": False, "output_norm": True, "output_gate": True}
    return options


class MultiHeadLayer(nnx.Module):
    """Input and output projections shared by the token mixers; subclasses implement the mixing."""

    def __init__(
        self,
        hidden_dim: int,
        key_dim: int,
        value_dim: int,
        output_dim: int,
        num_heads: int = 1,
        *,
        rngs: nnx.Rngs,
        forget_gate: bool,
        kernel_init: nnx.Initializer | None = None,
        gate_bias_init: nnx.Initializer | None = None,
        output_norm: bool = False,
        output_gate: bool = False,
        use_bias: bool = True,
        dtype: Any = jnp.float32,
    ):
        """Initialize the projections.

        Args:
          hidden_dim: width of the input.
          key_dim: total key channels (num_heads * K).
          value_dim: total value channels (num_heads * V).
          output_dim: width of the output.
          num_heads: number of heads; divides key_dim and value_dim.
          rngs: source of initial values.
          forget_gate: add a forget-gate projection, `gate_proj`, of key_dim channels.
          kernel_init: initializer of kernels; None uses PyTorch's `Linear` initialization, also for
            biases.
          gate_bias_init: initializer of the forget gate's bias; None: as other biases.
          output_norm: normalize each head's output to a root mean square of 1.
          output_gate: multiply the heads' output by silu(W_r x + b_r), as in GLA, section 4.4.
          use_bias: give all projections a bias. Without it, only those before a sigmoid have one:
            the forget gate's and, with a forget gate, the keys'.
          dtype: compute dtype of the projections.

        Raises:
          ValueError: num_heads does not divide key_dim and value_dim.
        """
        if key_dim % num_heads or value_dim % num_heads:
            raise ValueError(f"num_heads={num_heads} must divide {key_dim=} and {value_dim=}")
        self.num_heads = num_heads
        self.key_dim = key_dim
        self.value_dim = value_dim
        common = {
            "rngs": rngs,
            "dtype": dtype,
            "kernel_init": kernel_init,
            "bias_init": None if kernel_init is None else nnx.initializers.zeros_init(),
            "use_bias": use_bias,
        }

        def projection(width: int, **options: Any) -> Dense:
            return Dense(hidden_dim, width, ("embed", "heads"), **{**common, **options})

        self.query_proj = projection(key_dim)
        # sigmoid(0) = 0.5: a bias lets keys be small on average.
        self.key_proj = projection(key_dim, use_bias=use_bias or forget_gate)
        self.value_proj = projection(value_dim)
        gate = {"use_bias": True} | ({"bias_init": gate_bias_init} if gate_bias_init else {})
        self.gate_proj = projection(key_dim, **gate) if forget_gate else None
        self.output_norm = output_norm
        self.output_gate_proj = projection(value_dim) if output_gate else None
        self.out_proj = Dense(
            value_dim, output_dim, ("heads", "embed"), row_parallel=True, **common
        )

    @property
    def input_projections(self) -> list[Dense]:
        """Projections of the input, in the order of their fused matmul."""
        layers = (self.query_proj, self.key_proj, self.value_proj, self.gate_proj)
        return [layer for layer in (*layers, self.output_gate_proj) if layer is not None]

    def project_inputs(
        self, x: jax.Array, *, without_bias: Sequence[Dense | None] = ()
    ) -> tuple[tuple[jax.Array, ...], jax.Array | None]:
        """Project `x` to queries, keys, values and, with a forget gate, gate logits.

        Args:
          x: ``[..., hidden_dim]``.
          without_bias: layers whose bias the caller adds.

        Returns:
          These, ``[..., H, K or V]`` each, and the pre-activation of the output gate
          ``[..., H * V]`` or None; float32 (float64 if `dtype` is). Under tensor parallelism H is
          the local number of heads.
        """
        outputs = list(fused_dense(x, self.input_projections, without_bias=without_bias))
        output_gate = None if self.output_gate_proj is None else outputs.pop()
        key_dim, value_dim = self.key_dim // self.num_heads, self.value_dim // self.num_heads
        widths = (key_dim, key_dim, value_dim, key_dim)
        heads = (
            y.reshape(*x.shape[:-1], y.shape[-1] // width, width)
            for y, width in zip(outputs, widths, strict=False)
        )
        return tuple(heads), output_gate

    def project_outputs(self, y: jax.Array, output_gate: jax.Array | None) -> jax.Array:
        """Normalize, gate and project the heads.

        Args:
          y: outputs of the heads, ``[..., H, V]``.
          output_gate: pre-activation, ``[..., H * V]``; None leaves the gate out.

        Returns:
          ``[..., output_dim]`` float32 (float64 if `dtype` is).
        """
        gate = None if output_gate is None else output_gate.reshape(y.shape)
        if self.output_norm:
            y = rms_norm(y) if gate is None else gated_rms_norm(y, gate)
        elif gate is not None:
            y = apply_gate(y, gate)
        y = y.reshape(*y.shape[:-2], y.shape[-2] * y.shape[-1])
        return self.out_proj(y)

    def initial_state(self, batch_size: int) -> Any:
        """Return the recurrent state, zeros ``[B, H, K, V]``, float32 (float64 under x64)."""
        heads = self.num_heads
        return jnp.zeros((batch_size, heads, self.key_dim // heads, self.value_dim // heads))
