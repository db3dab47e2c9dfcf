"""Names of leaves: files contain them, so they never change."""

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


def test_a_leaf_is_named_by_its_path():
    tree = {"b": [1, (2, 3)], "a": Pair(first=4, second={"x": 5})}
    names = {"a/first": 4, "a/second/x": 5, "b/0": 1, "b/1/0": 2, "b/1/1": 3}
    assert named_leaves(tree) == names
    assert list(named_leaves(tree)) == list(names)


def test_fields_of_a_tuple_are_named_and_can_be_indexed():
    tree = (0, Both(keys=[1, 2], length=None))
    assert named_leaves(tree) == {"0": 0, "1/keys/0": 1, "1/keys/1": 2}
    doubled = jax.tree.map(lambda x: 2 * x, tree)
    assert doubled == (0, Both(keys=[2, 4], length=None))
    assert isinstance(doubled[1], Both)
    path = jax.tree_util.tree_leaves_with_path(tree)[2][0]
    assert tree[path[0].idx][path[1].key][path[2].idx] == 2
