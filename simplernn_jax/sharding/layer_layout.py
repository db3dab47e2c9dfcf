"""Two layouts of what belongs to the layers: one entry per layer, or all layers in one array.

With stages, all layers of a model are one (`models.layer_stack`): every leaf of their parameters is
stacked, ``[num_layers, ...]``, as is every leaf of their states, ``[B, num_layers, ...]``, so that
this axis can be divided among the stages. Files know only single layers, by name: what is
``layers/stacked/mlp_in/kernel`` here is ``layers/0/mlp_in/kernel``, ``layers/1/...`` there, so that
a run may go on with any number of stages.
"""

from typing import Any

import jax
import jax.numpy as jnp

from simplernn_jax.named_leaves import named_leaves

STACKED = "stacked"
"""The entry that stands for all layers, in place of 0, 1, ..."""


def layer_axis(name: str) -> int | None:
    """The axis of layers of the leaf called `name`; None of a leaf that is not stacked."""
    parts = name.split("/")
    return int(parts[0] == "carried") if STACKED in parts else None


def single_name(name: str, index: int) -> str:
    """What the part of layer `index` of the stacked leaf `name` is called on its own."""
    return "/".join(str(index) if part == STACKED else part for part in name.split("/"))


def in_layout_of(like: Any, tree: Any) -> Any:
    """`tree` with its layers stacked, or taken apart, as those of `like` are.

    Args:
      like: a training state, or parameters, of the wanted layout; only its structure and shapes
        are read.
      tree: the same in either layout.
    """
    single: dict[str, Any] = {}
    for name, leaf in named_leaves(tree).items():
        if (axis := layer_axis(name)) is None:
            single[name] = leaf
        else:
            parts = enumerate(jnp.moveaxis(leaf, axis, 0))
            single |= {single_name(name, index): part for index, part in parts}
    leaves = []
    for name, leaf in named_leaves(like).items():
        if (axis := layer_axis(name)) is None:
            leaves.append(single[name])
        else:
            names = [single_name(name, index) for index in range(leaf.shape[axis])]
            leaves.append(jnp.stack([single[each] for each in names], axis))
    return jax.tree.unflatten(jax.tree.structure(like), leaves)
