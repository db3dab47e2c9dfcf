"""Recurrence, convolution and attention of sequence shards, against one device."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from references import (
    assert_accurate,
    draw_recurrence,
    draw_shard_boundaries,
    recurrence,
    value_and_gradients,
    without_oldest,
)
from small_runs import mesh_of

from simplernn_jax.models import Attention, KVCache
from simplernn_jax.parallel.sequence import shard_segment_ids, sharded_recurrence

TIME = P(None, "sequence")


def on_shards(function, devices, in_specs, out_specs):
    mesh = mesh_of(sequence=devices)
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs))


@jax.jit
def on_one_device(inputs, segment_ids, cotangents):
    return value_and_gradients(
        lambda *inputs: recurrence(*inputs, segment_ids, method="scan"), inputs, cotangents
    )


@functools.partial(jax.jit, static_argnums=0)
def on_devices(devices, inputs, segment_ids, cotangents):
    def run(q, k, v, log_gate, state, segment_ids):
        ids = None if segment_ids is None else shard_segment_ids(segment_ids)
        return sharded_recurrence(q, k, v, log_gate, initial_state=state, segment_ids=ids)

    ids = None if segment_ids is None else TIME
    run = on_shards(run, devices, (TIME, TIME, TIME, TIME, P(), ids), (TIME, P()))
    return value_and_gradients(lambda *inputs: run(*inputs, segment_ids), inputs, cotangents)


def draw_log_gates(rng, shape):
    return -np.exp(rng.uniform(*np.log((1e-6, 27.0)), shape))


@pytest.mark.parametrize(("devices", "has_segments"), [(3, True), (8, False), (8, True)])
def test_recurrence_equals_one_device(devices, has_segments):
    length = 5 * devices
    with jax.enable_x64(True):
        inputs, cotangents = draw_recurrence(10, length, 3, 5, 7, jnp.float64, draw_log_gates)
        ids = draw_shard_boundaries(length, 5) if has_segments else None
        expected = on_one_device(inputs, ids, cotangents)
        assert_accurate(on_devices(devices, inputs, ids, cotangents), expected, {"all": 1e-12})


DEVICES, SHARD, BATCH, WIDTH = 4, 5, 10, 7
LENGTH = DEVICES * SHARD


@functools.cache
def attention(context):
    layer = Attention(
        WIDTH, 12, 10, 11, 2, context=context, rngs=nnx.Rngs(0), dtype=jnp.float64, output_gate=True
    )
    graph, params = nnx.split(layer)
    return graph, jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), params)


def attention_inputs(context, earlier):
    """Draw x, and a state after some tokens of each sequence, or None."""
    graph, params = attention(context)
    x = np.random.default_rng(context).normal(size=(BATCH, 30 + LENGTH, WIDTH))
    if not earlier:
        return x[:, 30:], None
    # Caches that are full, if `context` is at most 30, partly filled, and empty.
    ids = np.int32(np.arange(30)[None] < np.resize([0, 26, 30], (BATCH, 1)))
    state = jax.jit(nnx.merge(graph, params))(x[:, :30], None, ids)[1]
    return x[:, 30:], jax.tree.map(lambda leaf: np.asarray(leaf.at[2::3].set(0)), state)


@functools.partial(jax.jit, static_argnames=("context", "sharded"))
def results_and_gradients(params, x, state, ids, weights, *, context, sharded):
    graph, _ = attention(context)

    def run(params, x, state, ids):
        if ids is not None and sharded:
            ids = shard_segment_ids(ids)
        return nnx.merge(graph, params)(x, state, ids)

    def total(params, x, keys_and_values):
        before = None if state is None else KVCache(*keys_and_values, state.length)
        called = on_shards(run, DEVICES, (P(), TIME, P(), TIME), (TIME, P())) if sharded else run
        y, after = called(params, x, before, ids)
        after = without_oldest(after)
        results = (y, after.keys, after.values)
        return sum(jnp.vdot(*pair) for pair in zip(results, weights, strict=True)), (y, after)

    keys_and_values = None if state is None else (state.keys, state.values)
    return jax.value_and_grad(total, (0, 1, 2), has_aux=True)(params, x, keys_and_values)


@pytest.mark.parametrize(
    ("context", "earlier", "has_segments"),
    [(1, True, True), (SHARD + 1, True, False), (13, False, True), (100, True, True)],
    ids=["own token", "previous shard, with state", "some shards", "all shards, with state"],
)
def test_attention_equals_one_device(context, earlier, has_segments):
    with jax.enable_x64(True):
        x, state = attention_inputs(context, earlier)
        random = np.random.default_rng(5)
        shapes = [(BATCH, LENGTH, 11), (BATCH, 2, context, 6), (BATCH, 2, context, 5)]
        weights = [random.normal(size=shape) for shape in shapes]
        ids = draw_shard_boundaries(LENGTH, SHARD) if has_segments else None
        found, expected = (
            results_and_gradients(
                attention(context)[1], x, state, ids, weights, context=context, sharded=sharded
            )
            for sharded in (True, False)
        )
        chex.assert_trees_all_equal_dtypes(found, expected)
        chex.assert_trees_all_close(found, expected, rtol=1e-11, atol=1e-11)
