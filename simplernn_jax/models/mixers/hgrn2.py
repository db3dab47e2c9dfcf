"""HGRN2: a gated recurrence whose keys are what its gates forget.

Source: Qin et al. 2024, arXiv:2404.07904, section 3; as in `HGRN2ForCausalLM` of
flash-linear-attention.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from simplernn_jax.array_types import Activations, LogicalAxes
from simplernn_jax.config import ModelConfig
from simplernn_jax.models.layers import PARAM_DTYPE, RMSNorm
from simplernn_jax.models.mixers.convolved import OPTIONS, MultiHeadRecurrence, check_options
from simplernn_jax.models.mixers.token_mixer import register_mixer
from simplernn_jax.parallel.mesh import AXES

NO_BOUND = -30.0
"""Logit of a lower bound of 1e-13, which is none."""

_EPSILON = 1e-5
"""Of the norm; fla does not use ``norm_eps`` there."""


@register_mixer("hgrn2", options=OPTIONS, mesh_axes=AXES, check=check_options)
class HGRN2(MultiHeadRecurrence):
    """HGRN2 token mixer.

    The layer of the base class, without output gate and the activation of its convolutions, with a
    norm over all heads, and with the recurrence, per head, K = key_dim / num_heads::

        g = b + (1 - b) sigmoid(k)
        S' = diag(g) S + (1 - g) v^T            y = S'^T silu(q) / sqrt(K)

    The lower bounds b, per key channel, begin with i / num_layers in layer i = 0, 1, ..., as in
    fla. There they are sums of a softmax over layers; here each layer learns its own logits.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        """Initialize the parameters; see the base class."""
        super().__init__(config, rngs=rngs, output_gate=False, activation=None)
        self.head_norm = RMSNorm(config.value_dim, _EPSILON, axis="heads")
        bound = jnp.full(config.key_dim, NO_BOUND, PARAM_DTYPE)
        self.lower_bound = nnx.Param(bound, axes=LogicalAxes("heads"))

    def initialize_depth(self, layer: int, num_layers: int) -> None:
        """See `TokenMixer`."""
        bound = math.log(layer / (num_layers - layer)) if layer else NO_BOUND
        self.lower_bound.set_value(jnp.full_like(self.lower_bound[...], bound))

    def recurrence_inputs(
        self, x: Activations, q: jax.Array, k: jax.Array, v: jax.Array
    ) -> tuple[jax.Array, ...]:
        """Return (q, k, v, log_gate)."""
        bound = self.lower_bound[...].astype(k.dtype).reshape(1, 1, *k.shape[2:])
        log_sigmoid = jax.nn.log_sigmoid
        log_gate = jnp.logaddexp(log_sigmoid(bound), log_sigmoid(-bound) + log_sigmoid(k))
        return jax.nn.silu(q) * q.shape[-1] ** -0.5, -jnp.expm1(log_gate), v, log_gate

    def project_outputs(self, y: jax.Array, output_gate: jax.Array | None) -> jax.Array:
        """Normalize over all heads, and project."""
        y = y.reshape(*y.shape[:2], y.shape[2] * y.shape[3])
        return self.out_proj(self.head_norm(y))
