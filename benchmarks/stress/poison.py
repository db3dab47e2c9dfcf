"""Values that are not finite, in arrays and in the recurrence of a model."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from simplernn_jax.ops import gated_linear_recurrence

VALUES = {"NaN": np.nan, "+inf": np.inf, "-inf": -np.inf, "overflow": 3e38}
"""Each in float32; the last is finite, and its square is not."""

FORWARD, BACKWARD = 1000, 100_000
"""Segment ids of a poisoned sequence are raised by one of them for each value; see `code`."""


def spoil(tree: Any, value: str, draw: np.random.Generator) -> tuple[Any, str]:
    """Replace one number of a tree, and name its leaf."""
    paths, structure = jax.tree_util.tree_flatten_with_path(tree)
    leaves = [np.array(leaf) for _, leaf in paths]
    floating = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    index = draw.choice(floating)
    leaves[index].flat[draw.integers(leaves[index].size)] = VALUES[value]
    spoiled = jax.tree.unflatten(structure, [jnp.asarray(leaf) for leaf in leaves])
    return spoiled, jax.tree_util.keystr(paths[index][0])


def code(value: str, *, backward: bool) -> int:
    """Return what to add to the segment ids of a sequence for a value in its pass."""
    return (list(VALUES).index(value) + 1) * (BACKWARD if backward else FORWARD)


def recurrence(
    *arrays: jax.Array, segment_ids: jax.Array, **options: Any
) -> tuple[jax.Array, jax.Array]:
    """Compute `gated_linear_recurrence`, and poison the sequences whose ids are high."""
    output, state = gated_linear_recurrence(*arrays, segment_ids=segment_ids, **options)
    values = jnp.asarray([0.0, *VALUES.values()], output.dtype)
    ids = segment_ids[:, :, None, None]
    forward, backward = (values[ids // each % 100] for each in (FORWARD, BACKWARD))
    return _poison_gradient(output + forward, backward), state


@jax.custom_vjp
def _poison_gradient(x: jax.Array, added: jax.Array) -> jax.Array:
    return x


def _forward(x: jax.Array, added: jax.Array) -> tuple[jax.Array, jax.Array]:
    return x, added


def _backward(added: jax.Array, d_x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return d_x + added, jnp.zeros_like(added)


_poison_gradient.defvjp(_forward, _backward)
