"""Values that are not finite, in arrays and in the mixers of a model."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from simplernn_jax.models import TokenMixer, register_mixer
from simplernn_jax.models.mixers.token_mixer import find_mixer, make_mixer

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


MIXER = "poisoned"


@register_mixer(MIXER, mesh_axes=find_mixer("simple_rnn").mesh_axes)
class Poisoned(TokenMixer):
    """SimpleRNN that poisons the sequences whose segment ids are high."""

    def __init__(self, config: Any, *, rngs: Any):
        self.inner = make_mixer("simple_rnn", config, rngs=rngs)
        for name in ("initial_state", "reset", "select", "state_axes"):
            setattr(self, name, getattr(self.inner, name))

    def mix(self, x: Any, state: Any, segment_ids: Any) -> tuple[jax.Array, Any]:
        """Compute the layer, and add values to its output and its gradient."""
        output, state = self.inner.mix(x, state, segment_ids)
        values = jnp.asarray([0.0, *VALUES.values()], output.dtype)
        ids = segment_ids[:, :, None]
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
