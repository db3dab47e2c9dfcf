"""Names of leaves, which files contain."""

import dataclasses
from typing import Any, NamedTuple

import jax

from simplernn_jax.parallel.named_leaves import named_leaves, tuple_with_names


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Pair:
    first: object
    second: object


@tuple_with_names
class Both(NamedTuple):
    keys: Any
    length: Any


def test_a_leaf_is_named_by_its_path_and_fields_of_a_tuple_can_be_indexed():
    tree = {"b": [1, Both(keys=(2, 3), length=None)], "a": Pair(first=4, second={"x": 5})}
    names = {"a/first": 4, "a/second/x": 5, "b/0": 1, "b/1/keys/0": 2, "b/1/keys/1": 3}
    assert list(named_leaves(tree).items()) == list(names.items())
    assert isinstance(jax.tree.map(lambda x: 2 * x, tree)["b"][1], Both)
    path = jax.tree_util.tree_leaves_with_path(tree)[4][0]
    assert tree["b"][1][path[2].key][path[3].idx] == 3
