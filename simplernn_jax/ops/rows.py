"""What can be done with the rows of any recurrent state, whatever it is made of."""

import jax
import jax.numpy as jnp
import numpy as np

from simplernn_jax.array_types import ModelState


def clear_rows(state: ModelState, reset: jax.Array | np.ndarray) -> ModelState:
    """Zeros the state of the rows where `reset` ``[B]`` is True."""

    def clear(leaf: jax.Array) -> jax.Array:
        return jnp.where(reset.reshape(-1, *[1] * (leaf.ndim - 1)), 0, leaf)

    return jax.tree.map(clear, state)
