"""Check that a train step fits into memory.

By an estimate, and by XLA's memory analysis if the estimate is a quarter of device memory or more.
"""

from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from simplernn_jax import memory_estimate
from simplernn_jax.config import Config
from simplernn_jax.data.batches import Batch
from simplernn_jax.training.accumulation import choose_microbatches
from simplernn_jax.training.train_step import init_train_state, make_train_step

ANALYSIS_THRESHOLD = 0.25
"""Fraction of device memory above which the step is compiled and analyzed: the estimate is about a
third of XLA's analysis, and compilation takes about 10 s."""


def check_train_step(config: Config, optimizer: optax.GradientTransformation, mesh: Mesh) -> None:
    """Raise `UserError` if the train step does not fit in memory, before anything is allocated."""
    config = choose_microbatches(config, mesh)
    if memory_estimate.check_training(config, mesh) < ANALYSIS_THRESHOLD:
        return
    step: Any = make_train_step(config, optimizer, mesh)
    state = jax.eval_shape(lambda: init_train_state(config, optimizer))
    # The first step takes this program from the compilation cache.
    sizes = step.lower(state, _abstract_batch(config)).compile().memory_analysis()
    if sizes is not None:
        needed = sizes.argument_size_in_bytes + sizes.temp_size_in_bytes
        memory_estimate.check_program(needed, mesh)


def _abstract_batch(config: Config) -> Batch:
    shape = (config.data.batch_size, config.data.sequence_length)
    ids, mask = np.zeros(shape, np.int32), np.zeros(shape, bool)
    return jax.eval_shape(lambda: Batch(ids, ids, mask, ids, mask[:, 0]))
