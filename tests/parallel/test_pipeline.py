"""Chunks, dropout and memory of the pipeline; models/test_layer_stack.py has what it computes."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from small_runs import mesh_of

from simplernn_jax.parallel.pipeline import choose_num_chunks, run_pipeline

LAYERS, ROWS, LENGTH, WIDTH = 4, 6, 24, 8


def on_stages(layer, stages, chunks, key=None):
    """`run_pipeline` as a function of whole arrays."""
    run = jax.shard_map(
        functools.partial(run_pipeline, layer, chunks=chunks, dropout_key=key),
        mesh=mesh_of(pipeline=stages),
        in_specs=(P("pipeline"), P(), P(None, "pipeline"), P()),
        out_specs=(P(None, "pipeline"), P(None, "pipeline")),
    )
    return jax.jit(run)


def test_chunks_divide_time():
    for length, stages, chunks in ((256, 4, 16), (24, 4, 12), (14, 2, 2), (7, 1, 1)):
        assert choose_num_chunks(length, stages) == chunks


def test_dropout_follows_from_the_key_and_differs_by_chunk():
    def layer(params, x, state, segment_ids, key):
        return x + jax.random.normal(key), state

    x = jnp.zeros((1, LENGTH, 1))
    ids, states = np.zeros((1, LENGTH), np.int32), jnp.zeros((1, LAYERS))

    def draws(seed, stages):
        run = on_stages(layer, stages, 4, jax.random.key(seed))
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
        run = on_stages(layer, 2, x.shape[1] // 6)
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
