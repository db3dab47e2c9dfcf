"""Attention over sequence shards on several devices, against the same layer on one."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from meshes import mesh_of
from references import draw_shard_boundaries, without_oldest

from simplernn_jax.models import Attention, KVCache
from simplernn_jax.parallel.sequence import segment_offset, shard_segment_ids

DEVICES, SHARD, BATCH, WIDTH = 4, 5, 10, 7
LENGTH = DEVICES * SHARD
TIME = P(None, "sequence")


@functools.cache
def layer_of(context):
    layer = Attention(
        WIDTH, 12, 10, 11, 2, context=context, rngs=nnx.Rngs(0), dtype=jnp.float64, output_gate=True
    )
    graph, params = nnx.split(layer)
    return graph, jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), params)


def inputs(context, earlier):
    """Draw x, and a state after some tokens of each sequence, or None."""
    graph, params = layer_of(context)
    x = np.random.default_rng(context).normal(size=(BATCH, 30 + LENGTH, WIDTH))
    if not earlier:
        return x[:, 30:], None
    # Caches that are full, if `context` is at most 30, partly filled, and empty.
    ids = np.int32(np.arange(30)[None] < np.resize([0, 26, 30], (BATCH, 1)))
    state = jax.jit(nnx.merge(graph, params))(x[:, :30], None, ids)[1]
    return x[:, 30:], jax.tree.map(lambda leaf: np.asarray(leaf.at[2::3].set(0)), state)


@functools.partial(jax.jit, static_argnames=("context", "sharded"))
def results_and_gradients(params, x, state, ids, weights, *, context, sharded):
    graph, _ = layer_of(context)

    def run(params, x, state, ids):
        if ids is not None and sharded:
            ids = shard_segment_ids(ids)
        return nnx.merge(graph, params)(x, state, ids)

    def total(params, x, keys_and_values):
        before = None if state is None else KVCache(*keys_and_values, state.length)
        called = run
        if sharded:
            called = jax.shard_map(
                run,
                mesh=mesh_of(sequence=DEVICES),
                in_specs=(P(), TIME, P(), TIME),
                out_specs=(TIME, P()),
            )
        y, after = called(params, x, before, ids)
        after = without_oldest(after)
        results = (y, after.keys, after.values)
        return sum(jnp.vdot(*pair) for pair in zip(results, weights, strict=True)), (y, after)

    keys_and_values = None if state is None else (state.keys, state.values)
    return jax.value_and_grad(total, (0, 1, 2), has_aux=True)(params, x, keys_and_values)


@pytest.mark.fewer_cases
@pytest.mark.parametrize(
    ("context", "earlier", "segments"),
    [
        (1, True, [True]),
        (SHARD + 1, True, [True, False]),
        (13, False, [True, False]),
        (100, True, [True]),
    ],
    ids=["own token", "previous shard, with state", "some shards", "all shards, with state"],
)
def test_equals_one_device(context, earlier, segments):
    with jax.enable_x64(True):
        x, state = inputs(context, earlier)
        random = np.random.default_rng(5)
        shapes = [(BATCH, LENGTH, 11), (BATCH, 2, context, 6), (BATCH, 2, context, 5)]
        weights = [random.normal(size=shape) for shape in shapes]
        run = functools.partial(results_and_gradients, layer_of(context)[1], x, state)
        for has_segments in segments:
            ids = draw_shard_boundaries(LENGTH, SHARD) if has_segments else None
            found, expected = (
                run(ids, weights, context=context, sharded=sharded) for sharded in (True, False)
            )
            chex.assert_trees_all_equal_dtypes(found, expected)
            chex.assert_trees_all_close(found, expected, rtol=1e-11, atol=1e-11)


def test_counts_tokens_of_the_segment_before_a_shard():
    ids = jnp.asarray([[7, 7, 7, 7, 8, 8, 9, 9, 9], [1, 1, 2, 3, 3, 3, 3, 3, 3]], jnp.int32)
    first = jnp.asarray([10, 20], jnp.int32)

    def run(ids, first):
        return segment_offset(3, first, shard_segment_ids(ids))[:, None]

    sharded = jax.shard_map(run, mesh=mesh_of(sequence=3), in_specs=(TIME, P()), out_specs=TIME)
    found = jax.jit(sharded)(ids, first)
    np.testing.assert_array_equal(found, [[10, 13, 0], [20, 0, 3]])
