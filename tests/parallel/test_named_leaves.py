"""Names of leaves, which files contain; and layers in one array or one by one."""

import dataclasses
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from small_runs import small_config

from simplernn_jax.models import LanguageModel
from simplernn_jax.models.layer_stack import LayerStack
from simplernn_jax.parallel.named_leaves import in_layout_of, named_leaves, tuple_with_names

LAYERS = 3


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


def params_of(stacked=False):
    """Parameters with random values; stacked ones have the same."""
    config = small_config("residual", num_layers=LAYERS).model
    model = nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))
    graph, params = nnx.split(model, nnx.Param)
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(random.normal(size=x.shape), x.dtype), params)
    if stacked:
        model = nnx.merge(graph, params)
        model.layers = LayerStack(model.layers)
        params = nnx.state(model, nnx.Param)
    return params


def test_a_leaf_is_stacked_over_the_layers_and_keeps_its_name():
    params, stacked = params_of(), params_of(stacked=True)
    single = named_leaves(params)
    names = set()
    for name, leaf in named_leaves(stacked).items():
        parts = [name.replace("stacked", str(index)) for index in range(LAYERS)]
        names.update(parts)
        expected = np.stack([single[part] for part in parts]) if "layers" in name else single[name]
        np.testing.assert_array_equal(leaf, expected)
    assert names == set(single)
    chex.assert_trees_all_equal(in_layout_of(params, stacked), params)
    chex.assert_trees_all_equal(in_layout_of(stacked, params), stacked)
