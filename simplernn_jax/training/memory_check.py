"""Whether a train step fits in memory: by arithmetic, and where that is close, by the compiler."""

from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from simplernn_jax import memory_estimate
from simplernn_jax.config import Config
from simplernn_jax.data.batches import Batch
from simplernn_jax.training.train_step import init_train_state, make_train_step

COMPILED_FROM = 0.25
"""Share of the memory from which on the compiler is asked: the estimate is a third of what it
says, and a program takes 10 s to compile."""


def check_memory(config: Config, optimizer: optax.GradientTransformation, mesh: Mesh) -> None:
    """Check that the train step fits, before anything is allocated.

    Raises:
      UserError: it does not; says how much it needs and what there is.
    """
    if memory_estimate.check_training(config, mesh) < COMPILED_FROM:
        return
    step: Any = make_train_step(config, optimizer, mesh)
    state = jax.eval_shape(lambda: init_train_state(config, optimizer))
    # The compilation cache keeps it for the first step.
    sizes = step.lower(state, _abstract_batch(config)).compile().memory_analysis()
    if sizes is not None:
        needed = sizes.argument_size_in_bytes + sizes.temp_size_in_bytes
        memory_estimate.check_program(needed, mesh)


def _abstract_batch(config: Config) -> Batch:
    rows, length = config.data.batch_size, config.data.sequence_length
    ids: Any = jax.ShapeDtypeStruct((rows, length), np.int32)
    mask: Any = jax.ShapeDtypeStruct((rows, length), np.bool_)
    reset: Any = jax.ShapeDtypeStruct((rows,), np.bool_)
    return Batch(tokens=ids, targets=ids, loss_mask=mask, segment_ids=ids, reset=reset)
