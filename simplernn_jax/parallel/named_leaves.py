"""Leaves of a pytree by their name in files, with layers one by one or stacked.

With pipeline stages, layers are stacked (`models.layer_stack`): every leaf of their parameters is
``[num_layers, ...]`` and every leaf of their states ``[B, num_layers, ...]``, so that this axis can
be sharded over the stages. Files hold single layers: ``layers/stacked/mlp_in/kernel`` here is
``layers/0/mlp_in/kernel``, ``layers/1/...`` there, so that a run can resume with any number of
stages.
"""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp

_Class = TypeVar("_Class", bound=Any)

STACKED = "stacked"
"""The entry of stacked layers, in place of 0, 1, ..."""


def named_leaves(tree: Any) -> dict[str, Any]:
    """Return the leaves by path, in tree order, such as ``params/layers/0/mlp_in/kernel/value``.

    With names, some leaves can be read without the rest, and classes are not part of a file's
    format.
    """
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


class _Field(int):
    """Index of a tuple's field that prints as the field's name."""

    name: str

    def __str__(self) -> str:
        return self.name


def tuple_with_names(cls: type[_Class]) -> type[_Class]:
    """Register a ``NamedTuple`` as a pytree whose keys are indices that print as names.

    JAX's own keys are the names, with which `flax.nnx.tabulate` fails: it indexes every tuple.
    """
    keys = []
    for index, name in enumerate(cls._fields):
        field = _Field(index)
        field.name = name
        keys.append(jax.tree_util.DictKey(field))
    jax.tree_util.register_pytree_with_keys(
        cls,
        lambda fields: (tuple(zip(keys, fields, strict=True)), None),
        lambda _, leaves: cls(*leaves),
        lambda fields: (tuple(fields), None),
    )
    return cls


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
