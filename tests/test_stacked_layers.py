"""Layers in one array or one by one: names, values and what the optimizer makes of either."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_runs import small_config

from simplernn_jax.errors import UserError
from simplernn_jax.models import LanguageModel
from simplernn_jax.named_leaves import named_leaves
from simplernn_jax.parallel.stacked_layers import in_layout_of, stack_entries, stack_params
from simplernn_jax.training.optimizer import decay_mask, make_optimizer

LAYERS = 3


def params_of(block="residual"):
    config = small_config(block, num_layers=LAYERS, mlp_dim=5).model
    return nnx.state(LanguageModel(config, rngs=nnx.Rngs(0)), nnx.Param)


@pytest.mark.parametrize("block", ["plain", "residual"])
def test_a_leaf_is_stacked_over_the_layers_and_keeps_its_name(block):
    params = params_of(block)
    single, stacked = named_leaves(params), named_leaves(stack_params(params))
    assert {name for name in single if "layers" not in name} < set(stacked)
    for name, leaf in stacked.items():
        if "stacked" in name:
            parts = [single[name.replace("stacked", str(index))] for index in range(LAYERS)]
            np.testing.assert_array_equal(leaf, np.stack(parts))
    chex.assert_trees_all_equal(in_layout_of(params, stack_params(params)), params)
    chex.assert_trees_all_equal(in_layout_of(stack_params(params), params), stack_params(params))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_optimizer_does_to_stacked_layers_what_it_does_to_single_ones(name):
    config = small_config(name=name, warmup_steps=0, clip_norm=0.5, weight_decay=0.3).optimizer
    optimizer = make_optimizer(config, 7)
    params = params_of()
    random = np.random.default_rng(0)

    def noise(x):
        return jnp.asarray(random.normal(size=x.shape), x.dtype)

    stacked, update = stack_params(params), jax.jit(optimizer.update)
    state, stacked_state = jax.jit(lambda: (optimizer.init(params), optimizer.init(stacked)))()
    for _ in range(2):
        gradient = jax.tree.map(noise, params)
        updates, state = update(gradient, state, params)
        same, stacked_state = update(stack_params(gradient), stacked_state, stacked)
        chex.assert_trees_all_close(in_layout_of(updates, same), updates, rtol=2e-5, atol=1e-7)
    chex.assert_trees_all_close(in_layout_of(state, stacked_state), state, rtol=2e-5, atol=1e-7)


def test_only_matrices_of_single_layers_are_decayed():
    for name, is_on in named_leaves(decay_mask(stack_params(params_of()))).items():
        assert is_on == ("kernel" in name), name


@pytest.mark.parametrize("other", [{"x": jnp.zeros(2)}, {"y": jnp.zeros(3)}])
def test_layers_that_are_not_alike(other):
    with pytest.raises(UserError, match="layer 1 is of another kind than layer 0"):
        stack_entries([{"x": jnp.zeros(3)}, other])
