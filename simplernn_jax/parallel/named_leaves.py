"""Leaves of a pytree by their name in files."""

from typing import Any, TypeVar

import jax

_Class = TypeVar("_Class", bound=Any)


def named_leaves(tree: Any) -> dict[str, Any]:
    """Return the leaves by path, in tree order, such as ``params/layers/0/query/kernel/value``.

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
