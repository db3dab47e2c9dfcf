"""Gated DeltaNet: a gated recurrence that replaces what is stored at a key.

Source: Yang et al. 2024, arXiv:2412.06464; as in `GatedDeltaNetForCausalLM` of
flash-linear-attention.
"""

from typing import Any

import jax
from flax import nnx

from simplernn_jax.array_types import Activations, LogicalAxes, RecurrentState, SegmentIds
from simplernn_jax.config import ModelConfig, Scalar
from simplernn_jax.models.layers import PARAM_DTYPE, Dense, fused_dense
from simplernn_jax.models.mixers.convolved import (
    MultiHeadRecurrence,
    check_options,
    decay_init,
    decay_logarithm,
    dense_options,
    time_step_init,
)
from simplernn_jax.models.mixers.token_mixer import register_mixer
from simplernn_jax.ops.gated_delta_rule import gated_delta_rule
from simplernn_jax.ops.rms_norm import rms_norm

OPTIONS: dict[str, Scalar] = {"short_convolution": 4, "negative_eigenvalues": False}
"""``short_convolution``: width of the short convolutions; 0 disables them.
``negative_eigenvalues``: writing strengths up to 2 instead of 1 (arXiv:2411.12537)."""

_EPSILON = 1e-6
"""Added to the squared norm of queries and keys."""


@register_mixer(
    "gated_delta_net",
    options=OPTIONS,
    mesh_axes=("data", "fsdp", "tensor", "pipeline"),
    check=check_options,
)
class GatedDeltaNet(MultiHeadRecurrence):
    """Gated DeltaNet token mixer.

    The layer of the base class with the recurrence, per head, c = 1, or 2 with
    ``negative_eigenvalues``, and K = key_dim / num_heads::

        q, k = q / |q|, k / |k|                 beta = c sigmoid(w_b x)
        log g = -exp(A_log) softplus(w_a x + dt_bias)
        S' = g (I - beta k k^T) S + beta k v^T          y = S'^T q / sqrt(K)

    Without convolutions, q, k and v are silu(W x).
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        """Initialize the parameters; see the base class."""
        super().__init__(config, rngs=rngs)
        sizes: Any = (config.hidden_dim, config.num_heads, ("embed", "heads"))
        options = dense_options(config, rngs)
        self.decay_proj, self.strength_proj = Dense(*sizes, **options), Dense(*sizes, **options)
        axes, shape = LogicalAxes("heads"), (config.num_heads,)
        self.A_log = nnx.Param(decay_init(0, 16)(rngs.params(), shape, PARAM_DTYPE), axes=axes)
        self.dt_bias = nnx.Param(time_step_init(rngs.params(), shape, PARAM_DTYPE), axes=axes)
        self.max_strength = 2 if config.mixer_options["negative_eigenvalues"] else 1

    def recurrence_inputs(
        self, x: Activations, q: jax.Array, k: jax.Array, v: jax.Array
    ) -> tuple[jax.Array, ...]:
        """Return (q, k, v, log_gate, beta), the last two ``[B, T, H]``."""
        if self.convolutions is None:
            q, k, v = map(jax.nn.silu, (q, k, v))
        key_dim = q.shape[-1]
        q, k = (rms_norm(y, epsilon=_EPSILON / key_dim) for y in (q, k))
        decay, strength = fused_dense(x, [self.decay_proj, self.strength_proj])
        log_gate = decay_logarithm(self.A_log[...], self.dt_bias[...], decay)[1]
        beta = self.max_strength * jax.nn.sigmoid(strength)
        return q / key_dim, k * key_dim**-0.5, v, log_gate, beta

    def recur(
        self,
        inputs: tuple[jax.Array, ...],
        state: RecurrentState | None,
        segment_ids: SegmentIds | None,
    ) -> tuple[jax.Array, RecurrentState]:
        """See the base class."""
        return gated_delta_rule(*inputs, initial_state=state, segment_ids=segment_ids)
