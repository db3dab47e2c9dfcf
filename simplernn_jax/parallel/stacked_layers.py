"""Two layouts of what belongs to the layers: one entry per layer, or all layers in one array.

With stages, every leaf of a layer is stacked over the layers, ``[num_layers, ...]``, so that its
first axis can be sharded over the stages. Names in files are always those of single layers:
``layers/stacked/mlp_in/kernel`` is saved as ``layers/0/mlp_in/kernel``, ``layers/1/...``, so that a
run may go on with any number of stages.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from simplernn_jax.array_types import ModelState
from simplernn_jax.errors import UserError
from simplernn_jax.named_leaves import named_leaves

STACKED = "stacked"
"""The entry that stands for all layers, in place of 0, 1, ..."""


def is_stacked(path: tuple[Any, ...]) -> bool:
    """Whether the leaf at `path` has a first axis of layers."""
    return STACKED in jax.tree_util.keystr(path, simple=True, separator="/").split("/")


def stack_params(params: nnx.State) -> nnx.State:
    """Parameters of a model with all its layers in one entry, leaves ``[num_layers, ...]``.

    Raises:
      UserError: the layers are not alike.
    """
    layers = params["layers"]
    return nnx.State({**params, "layers": stack_entries([layers[i] for i in range(len(layers))])})


def stack_entries(entries: Sequence[Any]) -> ModelState:
    """One entry for all layers of what has one for each, such as their states."""
    shapes = [jax.tree.map(lambda leaf: leaf.shape, named_leaves(entry)) for entry in entries]
    for index, shape in enumerate(shapes):
        if shape != shapes[0]:
            raise UserError(
                f"--config.mesh.stage: layer {index} is of another kind than layer 0, and stages "
                "need layers that are all alike; set --config.mesh.stage=1"
            )
    return {STACKED: jax.tree.map(lambda *leaves: jnp.stack(leaves), *entries)}


def in_layout_of(like: Any, tree: Any) -> Any:
    """`tree` with its layers stacked, or taken apart, as those of `like` are.

    Args:
      like: a tree of the wanted layout; only its structure and shapes are read.
      tree: a tree with the same contents in either layout.
    """
    single: dict[str, Any] = {}
    for name, leaf in named_leaves(tree).items():
        names = _names_of_layers(name, leaf.shape)
        single.update(zip(names, leaf, strict=True) if names else {name: leaf})
    leaves = []
    for name, leaf in named_leaves(like).items():
        names = _names_of_layers(name, leaf.shape)
        leaves.append(jnp.stack([single[each] for each in names]) if names else single[name])
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _names_of_layers(name: str, shape: tuple[int, ...]) -> list[str]:
    """The names of the parts of a stacked leaf; empty for any other leaf."""
    parts = name.split("/")
    if STACKED not in parts:
        return []
    place = parts.index(STACKED)
    return ["/".join([*parts[:place], str(i), *parts[place + 1 :]]) for i in range(shape[0])]
