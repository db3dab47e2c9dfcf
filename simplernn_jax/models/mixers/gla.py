"""Gated linear attention (GLA): the mixer of `GLAForCausalLM` of flash-linear-attention.

Source: Yang et al. 2023, arXiv:2312.06635, section 4.4.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from simplernn_jax.array_types import Activations
from simplernn_jax.config import ModelConfig
from simplernn_jax.models.layers import Dense
from simplernn_jax.models.mixers.convolved import (
    OPTIONS,
    MultiHeadRecurrence,
    check_options,
    dense_options,
)
from simplernn_jax.models.mixers.token_mixer import register_mixer, reject_option
from simplernn_jax.parallel.mesh import AXES

GATE_LOGIT_NORMALIZER = 16
"""Divisor of the forget gates' logarithms; the paper's temperature tau."""

GATE_RANK = 16
"""Rank of the projection to forget gates."""


def _check(config: ModelConfig) -> None:
    check_options(config)
    floor = float(config.mixer_options["min_log_gate"])
    if not -math.inf < floor <= 0:
        reject_option("min_log_gate", floor, "negative, or 0 for no lower bound: gates are below 1")


# ``min_log_gate``: lower bound of the logarithms of forget gates, negative; 0 disables it.
@register_mixer("gla", options={"min_log_gate": 0.0, **OPTIONS}, mesh_axes=AXES, check=_check)
class GatedLinearAttention(MultiHeadRecurrence):
    """GLA token mixer; of its projections only `gate_up_proj` has a bias.

    The layer of the base class with the recurrence, per head, K = key_dim / num_heads::

        log g = log_sigmoid(W_2 W_1 x + b) / 16, clamped below at min_log_gate if that is nonzero
        S' = diag(g) S + k v^T                  y = S'^T q / sqrt(K)

    W_1 has `GATE_RANK` rows.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        """Initialize the parameters; see the base class."""
        super().__init__(config, rngs=rngs)
        options: dict[str, Any] = dense_options(config, rngs)
        self.gate_down_proj = Dense(config.hidden_dim, GATE_RANK, ("embed", None), **options)
        options |= {"use_bias": True, "bias_init": nnx.initializers.zeros_init()}
        self.gate_up_proj = Dense(GATE_RANK, config.key_dim, ("rank", "heads"), **options)
        self.min_log_gate = float(config.mixer_options["min_log_gate"])

    def recurrence_inputs(
        self, x: Activations, q: jax.Array, k: jax.Array, v: jax.Array
    ) -> tuple[jax.Array, ...]:
        """Return (q, k, v, log_gate)."""
        logits = self.gate_up_proj(self.gate_down_proj(x)).reshape(k.shape)
        log_gate = jax.nn.log_sigmoid(logits) / GATE_LOGIT_NORMALIZER
        if self.min_log_gate:
            log_gate = jnp.maximum(log_gate, self.min_log_gate)
        return q * q.shape[-1] ** -0.5, k, v, log_gate
