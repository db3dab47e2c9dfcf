"""Retention: the mixer of RetNet, whose gates are constants.

Source: Sun et al. 2023, arXiv:2307.08621, section 2; as in `RetNetForCausalLM` of
flash-linear-attention.
"""

import jax
import jax.numpy as jnp

from simplernn_jax.array_types import Activations, RecurrentState, SegmentIds
from simplernn_jax.config import ModelConfig
from simplernn_jax.models.mixers.attention import check_rotary
from simplernn_jax.models.mixers.convolved import OPTIONS, MultiHeadRecurrence, check_options
from simplernn_jax.models.mixers.token_mixer import register_mixer
from simplernn_jax.ops.attention import apply_rope
from simplernn_jax.parallel.collectives import axis_index, axis_size
from simplernn_jax.parallel.mesh import AXES
from simplernn_jax.parallel.sequence import AXIS


def _check(config: ModelConfig) -> None:
    check_options(config)
    check_rotary(config)


@register_mixer("retnet", options=OPTIONS, mesh_axes=AXES, check=_check)
class RetNet(MultiHeadRecurrence):
    """Multi-scale retention.

    The layer of the base class with the recurrence, for head h = 0, 1, ..., K = key_dim /
    num_heads, and R the rotation of `apply_rope` by one token::

        S' = (1 - 2^(-5-h)) R^T S + k v^T               y = S'^T q / sqrt(K)

    This equals keys and queries rotated by their positions, of which only differences matter; but
    the state does not depend on a position.
    """

    def recurrence_inputs(
        self, x: Activations, q: jax.Array, k: jax.Array, v: jax.Array
    ) -> tuple[jax.Array, ...]:
        """Return (q, k, v, log_gate), rotated by the distance from the state before the call."""
        first = 1 + axis_index(AXIS) * x.shape[1]
        positions = first + jnp.arange(x.shape[1], dtype=jnp.int32)[None]
        heads = axis_index("tensor") * q.shape[2] + jnp.arange(q.shape[2], dtype=jnp.int32)
        log_gate = jnp.log1p(-(2.0 ** (-5 - heads.astype(q.dtype))))[None, None, :, None]
        q = apply_rope(q, positions) * q.shape[-1] ** -0.5
        return q, apply_rope(k, positions), v, jnp.broadcast_to(log_gate, k.shape)

    def recur(
        self,
        inputs: tuple[jax.Array, ...],
        state: RecurrentState | None,
        segment_ids: SegmentIds | None,
    ) -> tuple[jax.Array, RecurrentState]:
        """See the base class; the state is rotated back to the last token."""
        y, state = super().recur(inputs, state, segment_ids)
        columns = jnp.moveaxis(state, 3, 1)  # [B, V, H, K]
        tokens = y.shape[1] * axis_size(AXIS)
        columns = apply_rope(columns, jnp.full((1, columns.shape[1]), -tokens, jnp.int32))
        return y, jnp.moveaxis(columns, 1, 3)
