"""Memory of a train step: by arithmetic, and where that is close, by XLA's memory analysis."""

from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from simplernn_jax import memory_estimate
from simplernn_jax.config import Config
from simplernn_jax.data.batches import Batch
from simplernn_jax.training.train_step import init_train_state, make_train_step

ANALYZED_FROM = 0.25
"""Share of the memory from which on the step is compiled: the estimate is a third of what XLA's
analysis gives, and a program takes 10 s to compile."""


def check_train_step(config: Config, optimizer: optax.GradientTransformation, mesh: Mesh) -> None:
    """Check that the train step fits in memory, before anything is allocated.

    Raises:
      UserError: it does not; says how much it needs and how much there is.
    """
    if memory_estimate.check_training(config, mesh) < ANALYZED_FROM:
        return
    step: Any = make_train_step(config, optimizer, mesh)
    state = jax.eval_shape(lambda: init_train_state(config, optimizer))
    # The first step takes this program from the compilation cache.
    sizes = step.lower(state, _abstract_batch(config)).compile().memory_analysis()
    if sizes is not None:
        needed = sizes.argument_size_in_bytes + sizes.temp_size_in_bytes
        memory_estimate.check_program(needed, mesh)


def _abstract_batch(config: Config) -> Batch:
    batch_size, length = config.data.batch_size, config.data.sequence_length
    ids: Any = jax.ShapeDtypeStruct((batch_size, length), np.int32)
    mask: Any = jax.ShapeDtypeStruct((batch_size, length), np.bool_)
    reset: Any = jax.ShapeDtypeStruct((batch_size,), np.bool_)
    return Batch(tokens=ids, targets=ids, loss_mask=mask, segment_ids=ids, reset=reset)
