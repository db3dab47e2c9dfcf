"""Segments of packed sequences, and the states that they reset."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from simplernn_jax.array_types import ModelState
from simplernn_jax.ops.checks import BOOL, INTEGER, check_array, check_batch


def segment_starts(segment_ids: jax.Array | np.ndarray) -> jax.Array:
    """Mark the tokens whose id differs from the id of the token before, ``[B, T]`` bool.

    Raises:
      ValueError: `segment_ids` is not ``[B, T]``.
      TypeError: `segment_ids` is not of integers.
    """
    check_array("segment_ids", segment_ids, "B T", INTEGER)
    changed = segment_ids[:, 1:] != segment_ids[:, :-1]
    return jnp.pad(changed, ((0, 0), (1, 0)))[:, : segment_ids.shape[1]]


def mask_to_last_segment(tail: jax.Array, starts: jax.Array | None) -> jax.Array:
    """Zero the last P inputs ``[B, P, D]`` that are not in the last token's segment."""
    if starts is None:
        return tail
    past = tail.shape[1]
    late = jnp.pad(starts, ((0, 0), (past, 0)))[:, starts.shape[1] :].astype(jnp.int32)
    starts_after = jnp.flip(jnp.cumsum(jnp.flip(late, 1), axis=1), 1) - late
    return jnp.where(starts_after[..., None] > 0, 0, tail)


def reset_state(state: ModelState, reset: jax.Array | np.ndarray) -> ModelState:
    """Zero the state of the sequences where `reset` ``[B]`` is True."""
    check_batch("state", state, check_array("reset", reset, "B", BOOL)["B"])

    return jax.tree.map(lambda leaf: select_sequences(reset, 0, leaf), state)


def select_sequences(where: jax.Array | np.ndarray, chosen: Any, other: jax.Array) -> jax.Array:
    """Select `chosen`, broadcast, where `where` ``[B]`` is True, else `other` ``[B, ...]``."""
    return jnp.where(where.reshape(-1, *[1] * (other.ndim - 1)), chosen, other)
