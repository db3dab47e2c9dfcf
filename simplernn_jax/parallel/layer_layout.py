"""Two layouts of the arrays of the layers: one entry per layer, or all layers stacked in one.

With pipeline stages, layers are stacked (`models.layer_stack`): every leaf of their parameters is
``[num_layers, ...]`` and every leaf of their states ``[B, num_layers, ...]``, so that this axis can
be sharded over the stages. Files hold single layers: ``layers/stacked/mlp_in/kernel`` here is
``layers/0/mlp_in/kernel``, ``layers/1/...`` there, so that a run can resume with any number of
stages.
"""

from typing import Any

import jax
import jax.numpy as jnp

from simplernn_jax.parallel.named_leaves import named_leaves

STACKED = "stacked"
"""The entry of stacked layers, in place of 0, 1, ..."""


def layer_axis(name: str) -> int | None:
    """Return the axis of layers of the leaf `name`; None if it is not stacked."""
    parts = name.split("/")
    return int(parts[0] == "carried") if STACKED in parts else None


def single_name(name: str, index: int) -> str:
    """Return the name of layer `index` of the stacked leaf `name`."""
    return "/".join(str(index) if part == STACKED else part for part in name.split("/"))


def in_layout_of(like: Any, tree: Any) -> Any:
    """Stack or unstack the layers of `tree` to the layout of `like`.

    Args:
      like: a training state, or parameters, of the wanted layout; only its structure and shapes
        are used.
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
