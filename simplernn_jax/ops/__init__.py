"""Operations as pure functions: no Flax, no configuration."""

from simplernn_jax.ops.gated_linear_recurrence import gated_linear_recurrence, recurrent_step

__all__ = ["gated_linear_recurrence", "recurrent_step"]
