"""The leaves of a pytree by name, as they are called in files."""

from typing import Any

import jax


def named_leaves(tree: Any) -> dict[str, Any]:
    """Leaves by path, in the tree's order, such as ``params/layers/0/query/kernel/value``.

    Names instead of the tree itself: a part can be read without knowing the rest, and classes
    are not part of a file's format.
    """
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
