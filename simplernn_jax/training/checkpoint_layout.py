"""Conversion between the train state and its layout in checkpoints."""

import copy
from functools import partial

import jax
import optax
from jax.sharding import Mesh

from simplernn_jax.config import Config
from simplernn_jax.parallel.layer_layout import in_layout_of
from simplernn_jax.parallel.shardings import named_shardings, shard_further
from simplernn_jax.training.train_step import (
    TrainState,
    init_train_state,
    state_shardings,
    state_specs,
)


class CheckpointLayout:
    """Conversion between stacked pipeline stages and the per-layer layout of checkpoints.

    Without stages the two states are the same, and nothing is converted. The arguments are those
    of the run.
    """

    def __init__(self, config: Config, optimizer: optax.GradientTransformation, mesh: Mesh):
        single = copy.deepcopy(config)
        single.mesh.pipeline = 1
        self.abstract: TrainState = jax.eval_shape(lambda: init_train_state(single, optimizer))
        """Names, shapes and dtypes of the state in checkpoints."""
        self.shardings = state_shardings(single, optimizer, mesh)
        """Shardings of its arrays; None on one device."""
        self._is_same = config.mesh.pipeline == 1
        if self._is_same:
            return
        # Sharded over the stages too: no stage needs memory for all layers.
        specs = shard_further(self.abstract, state_specs(single, optimizer, mesh), "pipeline", mesh)
        self.shardings = named_shardings(specs, mesh)
        trained = jax.eval_shape(lambda: init_train_state(config, optimizer))
        self._to_checkpoint = jax.jit(
            partial(in_layout_of, self.abstract), out_shardings=self.shardings
        )
        self._from_checkpoint = jax.jit(
            partial(in_layout_of, trained), out_shardings=state_shardings(config, optimizer, mesh)
        )

    def to_checkpoint(self, state: TrainState) -> TrainState:
        """Convert the train state to the layout of checkpoints."""
        return state if self._is_same else self._to_checkpoint(state)

    def from_checkpoint(self, state: TrainState) -> TrainState:
        """Convert the layout of checkpoints to the train state."""
        return state if self._is_same else self._from_checkpoint(state)
