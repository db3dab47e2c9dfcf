"""Per-sequence reset and selection of state pytrees."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from simplernn_jax.array_types import ModelState
from simplernn_jax.ops.checks import BOOL, check_array, check_batch


def reset_state(state: ModelState, reset: jax.Array | np.ndarray) -> ModelState:
    """Zero the state of the sequences where `reset` ``[B]`` is True."""
    check_batch("state", state, check_array("reset", reset, "B", BOOL)["B"])

    return jax.tree.map(lambda leaf: select_sequences(reset, 0, leaf), state)


def select_sequences(where: jax.Array | np.ndarray, chosen: Any, other: jax.Array) -> jax.Array:
    """Select `chosen`, broadcast, where `where` ``[B]`` is True, else `other` ``[B, ...]``."""
    return jnp.where(where.reshape(-1, *[1] * (other.ndim - 1)), chosen, other)
