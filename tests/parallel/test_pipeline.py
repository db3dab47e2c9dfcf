"""The pipeline equals its layers one after another in outputs, states and gradients."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P
from small_runs import small_config

from simplernn_jax.config import MeshConfig
from simplernn_jax.models.blocks import PlainBlock
from simplernn_jax.parallel.mesh import make_mesh
from simplernn_jax.parallel.pipeline import choose_num_chunks, run_pipeline

LAYERS, ROWS, LENGTH, WIDTH = 4, 6, 24, 8


def stack(trees, axis=0):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves, axis), *trees)


def plain_layers():
    """(layer function, stacked parameters, stacked states that are not zero), float64."""
    config = small_config(hidden_dim=WIDTH, num_heads=2, precision="float64").model
    blocks = [PlainBlock(config, "simple_rnn", rngs=nnx.Rngs(index)) for index in range(LAYERS)]
    graph = nnx.split(blocks[0], nnx.Param)[0]

    def layer(params, x, state, segment_ids, key):
        return nnx.merge(graph, params)(x, state, segment_ids, key)

    params = stack([nnx.split(block, nnx.Param)[1] for block in blocks])
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)
    states = random_like(stack([block.initial_state(ROWS) for block in blocks], axis=1))
    return layer, params, states


def inputs():
    """(x, segment ids whose changes fall inside chunks, at their ends and at their starts)."""
    random = np.random.default_rng(1)
    begins = random.random((ROWS, LENGTH)) < 0.2
    begins[:2] = False
    begins[1, ::4] = True
    x = jnp.asarray(random.normal(size=(ROWS, LENGTH, WIDTH)))
    return x, np.cumsum(begins, axis=1, dtype=np.int32)


def in_turn(layer, params, x, states, segment_ids):
    """The definition: one layer after another over all of the time."""
    new_states = []
    for index in range(LAYERS):
        own = jax.tree.map(lambda leaf, index=index: leaf[index], params)
        state = jax.tree.map(lambda leaf, index=index: leaf[:, index], states)
        x, state = layer(own, x, state, segment_ids, None)
        new_states.append(state)
    return x, stack(new_states, axis=1)


def on_stages(layer, chunks=None, key=None, **sizes):
    """`run_pipeline` as a function of whole arrays."""
    mesh = make_mesh(MeshConfig(**sizes), jax.devices()[: np.prod(list(sizes.values()))])
    chunks = chunks or choose_num_chunks(LENGTH, sizes["pipeline"])
    rows, states = P("data"), P("data", "pipeline")
    run = jax.shard_map(
        functools.partial(run_pipeline, layer, chunks=chunks, dropout_key=key),
        mesh=mesh,
        in_specs=(P("pipeline"), rows, states, rows),
        out_specs=(P("data", "pipeline"), states),
    )
    return jax.jit(run)


def weighted(function, weights):
    """Sums of all that `function` returns, so that every part has a gradient."""

    def total(params, x, states, segment_ids):
        results = function(params, x, states, segment_ids)
        return jax.tree.reduce(jnp.add, jax.tree.map(jnp.vdot, results, weights)), results

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))


def random_like(tree):
    random = np.random.default_rng(2)
    return jax.tree.map(lambda x: jnp.asarray(random.normal(size=x.shape), x.dtype), tree)


def test_a_pipeline_equals_the_layers_one_after_another():
    with jax.enable_x64(True):
        layer, params, states = plain_layers()
        x, segment_ids = inputs()
        arguments = (params, x, states, segment_ids)
        expected = functools.partial(in_turn, layer)
        weights = random_like(jax.eval_shape(expected, *arguments))
        one, gradients = weighted(expected, weights)(*arguments)
        assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradients))
        for chunks, sizes in (
            (24, {"data": 1, "pipeline": 4}),  # a chunk is one token
            (2, {"data": 3, "pipeline": 2}),
        ):
            many, same = weighted(on_stages(layer, chunks, **sizes), weights)(*arguments)
            chex.assert_trees_all_close(many, one, rtol=1e-11, atol=1e-12)
            chex.assert_trees_all_close(same, gradients, rtol=1e-11, atol=1e-11)


def test_chunks_divide_time():
    for length, stages, chunks in ((256, 4, 16), (24, 4, 12), (14, 2, 2), (7, 1, 1)):
        assert choose_num_chunks(length, stages) == chunks


def test_dropout_follows_from_the_key_and_differs_by_chunk():
    def layer(params, x, state, segment_ids, key):
        return x + jax.random.normal(key), state

    x = jnp.zeros((1, LENGTH, 1))
    ids, states = np.zeros((1, LENGTH), np.int32), jnp.zeros((1, LAYERS))

    def draws(seed, stages):
        run = on_stages(layer, 4, jax.random.key(seed), data=1, pipeline=stages)
        return np.asarray(run(jnp.zeros(LAYERS), x, states, ids)[0])

    found = draws(0, 4)
    chex.assert_trees_all_close(draws(0, 2), found, rtol=1e-6)
    assert len(np.unique(found)) == 4  # by chunk
    assert not np.allclose(draws(1, 4), found)


def test_memory_grows_with_the_inputs_of_ticks_not_their_residuals():
    wide = 100

    def layer(params, x, state, segment_ids, key):
        hidden = jnp.tanh(x @ jnp.tile(params, (1, wide)))  # `wide` times as large as x
        return jnp.tanh(x + hidden @ jnp.tile(params, (1, wide)).T), state

    def gradient(params, x, states, ids):
        run = on_stages(layer, x.shape[1] // 6, data=1, pipeline=2)
        return jax.grad(lambda params, x: jnp.sum(run(params, x, states, ids)[0]), (0, 1))(
            params, x
        )

    def memory(length):
        x = jax.ShapeDtypeStruct((ROWS, length, WIDTH), jnp.float32)
        ids = jax.ShapeDtypeStruct((ROWS, length), jnp.int32)
        params, states = jnp.zeros((LAYERS, WIDTH, WIDTH)), jnp.zeros((ROWS, LAYERS))
        compiled = jax.jit(gradient).lower(params, x, states, ids).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    once = ROWS * 96 * WIDTH * 4
    assert memory(192) - memory(96) < 10 * once < wide * once
