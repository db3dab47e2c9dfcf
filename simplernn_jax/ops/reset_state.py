"""Resets of recurrent states of any structure."""

import jax
import jax.numpy as jnp
import numpy as np

from simplernn_jax.array_types import ModelState
from simplernn_jax.ops.checks import BOOL, check_array, check_batch


def reset_state(state: ModelState, reset: jax.Array | np.ndarray) -> ModelState:
    """Zero the state of the sequences where `reset` ``[B]`` is True.

    Raises:
      ValueError: `reset` has another rank, or a leaf of `state` another batch size.
      TypeError: `reset` is not of bool.
    """
    check_batch("state", state, check_array("reset", reset, "B", BOOL)["B"])

    def reset_leaf(leaf: jax.Array) -> jax.Array:
        return jnp.where(reset.reshape(-1, *[1] * (leaf.ndim - 1)), 0, leaf)

    return jax.tree.map(reset_leaf, state)
