"""Operations as pure functions: no Flax, no configuration, no mesh."""

from simplernn_jax.ops.gated_linear_recurrence import gated_linear_recurrence, recurrent_step

__all__ = ["gated_linear_recurrence", "recurrent_step"]
