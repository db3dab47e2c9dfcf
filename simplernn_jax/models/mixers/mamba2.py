"""Mamba-2: a state space model with one decay per head.

Source: Dao and Gu 2024, arXiv:2405.21060, sections 5 to 7; as in `Mamba2ForCausalLM` of
flash-linear-attention, whose blocks have no MLP: ``block="swiglu"`` with ``mlp_dim=0``.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from simplernn_jax.array_types import Activations, LogicalAxes, RecurrentState, SegmentIds
from simplernn_jax.config import ModelConfig, Scalar
from simplernn_jax.models.layers import PARAM_DTYPE, Dense, RMSNorm, fused_dense
from simplernn_jax.models.mixers.convolved import (
    OPTIONS,
    ConvolvedMixer,
    ConvStates,
    check_options,
    decay_init,
    decay_logarithm,
    dense_options,
    make_convolutions,
    time_step_init,
)
from simplernn_jax.models.mixers.token_mixer import register_mixer
from simplernn_jax.parallel.mesh import AXES

_OPTIONS: dict[str, Scalar] = {**OPTIONS, "short_convolution": 4}


@register_mixer("mamba2", options=_OPTIONS, mesh_axes=AXES, check=check_options)
class Mamba2(ConvolvedMixer):
    """Mamba-2 token mixer; all heads share queries (C) and keys (B).

    With ``conv`` a `ShortConvolution` with bias and silu, per head with values ``u``::

        q, k, u = conv(W_q x), conv(W_k x), conv(W_v x)
        dt = softplus(w_dt x + dt_bias)         log g = -exp(A_log) dt
        S' = g S + k (dt u)^T                   y = S'^T q + D u
        output = W_o norm(concat_heads(y) * silu(W_r x))

    K = key_dim / num_heads is the size of the state (``state_size``), and value_dim is the inner
    width (``expand * hidden_size``).
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        """Initialize the parameters.

        Args:
          config: sizes, precisions and all options; see `ModelConfig`.
          rngs: source of initial values.

        Raises:
          ValueError: num_heads does not divide key_dim and value_dim.
        """
        num_heads, key_dim, value_dim = config.num_heads, config.key_dim, config.value_dim
        if key_dim % num_heads or value_dim % num_heads:
            raise ValueError(f"{num_heads=} must divide {key_dim=} and {value_dim=}")
        self.hidden_dim, self.num_heads = config.hidden_dim, num_heads
        self.key_dim, self.value_dim = key_dim, value_dim
        options = dense_options(config, rngs)

        def projection(width: int, axis: str | None) -> Dense:
            return Dense(config.hidden_dim, width, ("embed", axis), **options)

        state_size = key_dim // num_heads
        self.query_proj, self.key_proj = projection(state_size, None), projection(state_size, None)
        self.value_proj = projection(value_dim, "heads")
        self.output_gate_proj = projection(value_dim, "heads")
        self.dt_proj = projection(num_heads, "heads")
        sizes = (state_size, state_size, value_dim)
        self.convolutions = make_convolutions(
            config, sizes, (None, None, "heads"), activation=jax.nn.silu, use_bias=True
        )
        axes, shape = LogicalAxes("heads"), (num_heads,)
        self.A_log = nnx.Param(decay_init(1, 16)(rngs.params(), shape, PARAM_DTYPE), axes=axes)
        self.dt_bias = nnx.Param(time_step_init(rngs.params(), shape, PARAM_DTYPE), axes=axes)
        self.D = nnx.Param(jnp.ones(shape, PARAM_DTYPE), axes=axes)
        self.norm = RMSNorm(value_dim, config.norm_epsilon, axis="heads")
        output: Any = (value_dim, config.hidden_dim, ("heads", "embed"))
        self.out_proj = Dense(*output, row_parallel=True, **options)
        self.method = str(config.mixer_options["method"])

    def project(
        self, x: Activations, conv_states: ConvStates | None, segment_ids: SegmentIds | None
    ) -> tuple[tuple[jax.Array, ...], jax.Array | None, ConvStates | None]:
        """See the base class; the inputs of the recurrence end with D u ``[B, T, H, V]``."""
        q, k = fused_dense(x, [self.query_proj, self.key_proj])
        u, output_gate, dt = fused_dense(x, [self.value_proj, self.output_gate_proj, self.dt_proj])
        (q, k, u), conv_states = self.convolve((q, k, u), conv_states, segment_ids)
        u = u.reshape(*u.shape[:2], dt.shape[2], self.value_dim // self.num_heads)
        dt, log_gate = decay_logarithm(self.A_log[...], self.dt_bias[...], dt)
        shape = (*dt.shape, q.shape[-1])
        q, k = (jnp.broadcast_to(y[:, :, None], shape) for y in (q, k))
        skip = self.D[...].astype(u.dtype)[None, None, :, None] * u
        log_gate = jnp.broadcast_to(log_gate[..., None], shape)
        return (q, k, dt[..., None] * u, log_gate, skip), output_gate, conv_states

    def recur(
        self,
        inputs: tuple[jax.Array, ...],
        state: RecurrentState | None,
        segment_ids: SegmentIds | None,
    ) -> tuple[jax.Array, RecurrentState]:
        """See the base class."""
        *inputs_of_state, skip = inputs
        y, state = super().recur(tuple(inputs_of_state), state, segment_ids)
        return y + skip, state

    def project_outputs(self, y: jax.Array, output_gate: jax.Array | None) -> jax.Array:
        """Gate, normalize over all heads, and project."""
        assert output_gate is not None
        y = y.reshape(output_gate.shape) * jax.nn.silu(output_gate)
        return self.out_proj(self.norm(y))
