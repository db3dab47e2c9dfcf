"""Attention over stretches of time on several devices, against the same layer on one."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from meshes import mesh_of

from simplernn_jax.models import Attention, KVCache
from simplernn_jax.ops.context_parallel import tokens_before
from simplernn_jax.ops.sequence_parallel import shard_segment_ids

DEVICES, STRETCH, ROWS, WIDTH = 4, 5, 3, 7
LENGTH = DEVICES * STRETCH
TIME = P(None, "sequence")


def boundaries(kind):
    """``[B, T]`` ids."""
    time, random = np.arange(LENGTH), np.random.default_rng(3)
    rows = {
        "edges and beside them": [time // STRETCH, (time + 1) // STRETCH, (time + 4) // STRETCH],
        # The same id again is another document if one lies between.
        "every token, two in turn": [time, (time // 4) % 2, (time // STRETCH) % 2],
        "anywhere": np.cumsum(random.random((ROWS, LENGTH)) < [[0.0], [0.1], [0.3]], axis=1),
    }[kind]
    return np.stack(rows).astype(np.int32)


KINDS = ("edges and beside them", "every token, two in turn", "anywhere")


@functools.cache
def layer_of(context):
    layer = Attention(
        WIDTH, 12, 10, 11, 2, context=context, rngs=nnx.Rngs(0), dtype=jnp.float64, output_gate=True
    )
    graph, params = nnx.split(layer)
    return graph, jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)


def inputs(context, earlier):
    """x, and a state after some tokens of each row, or None."""
    graph, params = layer_of(context)
    x = np.random.default_rng(context).normal(size=(ROWS, 30 + LENGTH, WIDTH))
    if not earlier:
        return x[:, 30:], None
    # One row's cache is full if it can be, one has room, one is empty.
    ids = np.int32(np.arange(30)[None] < np.array([[0], [26], [30]]))
    state = jax.jit(nnx.merge(graph, params))(x[:, :30], None, ids)[1]
    return x[:, 30:], jax.tree.map(lambda leaf: np.asarray(leaf.at[2].set(0)), state)


def without_the_oldest(state):
    """The cache without what no query can see: the slot that the next token takes."""
    rows, slots = jnp.arange(ROWS), state.length % state.keys.shape[2]
    keys, values = (cached.at[rows, :, slots].set(0) for cached in state[:2])
    return KVCache(keys, values, state.length)


@functools.partial(
    jax.jit,
    static_argnames=("context", "is_apart"),
)
def results_and_gradients(params, x, state, ids, weights, *, context, is_apart):
    graph, _ = layer_of(context)

    def run(params, x, state, ids):
        if ids is not None and is_apart:
            ids = shard_segment_ids(ids)
        return nnx.merge(graph, params)(x, state, ids)

    def total(params, x, keys_and_values):
        before = None if state is None else KVCache(*keys_and_values, state.length)
        called = run
        if is_apart:
            called = jax.shard_map(
                run,
                mesh=mesh_of(sequence=DEVICES),
                in_specs=(P(), TIME, P(), TIME),
                out_specs=(TIME, P()),
            )
        y, after = called(params, x, before, ids)
        after = without_the_oldest(after)
        results = (y, after.keys, after.values)
        return sum(jnp.vdot(*pair) for pair in zip(results, weights, strict=True)), (y, after)

    keys_and_values = None if state is None else (state.keys, state.values)
    return jax.value_and_grad(total, (0, 1, 2), has_aux=True)(params, x, keys_and_values)


@pytest.mark.parametrize(
    ("context", "earlier", "kinds"),
    [
        (1, True, KINDS),
        (STRETCH + 1, True, (*KINDS, None)),
        (13, False, (*KINDS, None)),
        (100, True, KINDS),
    ],
    ids=["own token", "neighbour, goes on", "some stretches", "whole row, goes on"],
)
def test_equals_one_device_with_documents_anywhere(context, earlier, kinds):
    with jax.enable_x64(True):
        x, state = inputs(context, earlier)
        random = np.random.default_rng(5)
        shapes = [(ROWS, LENGTH, 11), (ROWS, 2, context, 6), (ROWS, 2, context, 5)]
        weights = [random.normal(size=shape) for shape in shapes]
        run = functools.partial(results_and_gradients, layer_of(context)[1], x, state)
        for kind in kinds:
            ids = None if kind is None else boundaries(kind)
            found, expected = (
                run(ids, weights, context=context, is_apart=is_apart) for is_apart in (True, False)
            )
            chex.assert_trees_all_equal_dtypes(found, expected)
            chex.assert_trees_all_close(found, expected, rtol=1e-11, atol=1e-11)


def test_a_stretch_knows_how_much_of_its_segment_lies_before_it():
    ids = jnp.asarray([[7, 7, 7, 7, 8, 8, 9, 9, 9], [1, 1, 2, 3, 3, 3, 3, 3, 3]], jnp.int32)
    first = jnp.asarray([10, 20], jnp.int32)

    def run(ids, first):
        return tokens_before(3, first, shard_segment_ids(ids))[:, None]

    found = jax.shard_map(run, mesh=mesh_of(sequence=3), in_specs=(TIME, P()), out_specs=TIME)(
        ids, first
    )
    np.testing.assert_array_equal(found, [[10, 13, 0], [20, 0, 3]])
