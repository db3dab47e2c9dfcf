"""The recurrence over sequence shards on several devices, against the definition on one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from meshes import mesh_of
from references import (
    assert_accurate,
    draw_recurrence,
    draw_shard_boundaries,
    recurrence,
    value_and_gradients,
)

from simplernn_jax.parallel.sequence import (
    halo,
    shard_segment_ids,
    sharded_convolution,
    sharded_recurrence,
)

TIME = P(None, "sequence")


def draw(length, gates, dtype):
    def log_gates(rng, shape):
        return -np.exp(rng.uniform(*np.log(gates), shape))

    return draw_recurrence(10, length, 3, 5, 7, dtype, log_gates)


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
    run = jax.shard_map(
        run,
        mesh=mesh_of(sequence=devices),
        in_specs=(TIME, TIME, TIME, TIME, P(), ids),
        out_specs=(TIME, P()),
    )
    return value_and_gradients(lambda *inputs: run(*inputs, segment_ids), inputs, cotangents)


@pytest.mark.fewer_cases
@pytest.mark.parametrize("devices", [3, 8])
@pytest.mark.parametrize("has_segments", [False, True])
def test_equals_one_device(devices, has_segments):
    length = 5 * devices
    with jax.enable_x64(True):
        inputs, cotangents = draw(length, (1e-6, 27.0), jnp.float64)
        ids = draw_shard_boundaries(length, 5) if has_segments else None
        expected = on_one_device(inputs, ids, cotangents)
        assert_accurate(on_devices(devices, inputs, ids, cotangents), expected, {"all": 1e-12})


@pytest.mark.parametrize("gates", [(1e-7, 1e-2), (1e-6, 27.0), (20.0, 28.0)])
def test_float32_accuracy_equals_that_of_one_device(gates):
    length = 8 * 128
    ids = np.tile(np.arange(length) // np.array([[length], [length - 1]]), (5, 1))
    with jax.enable_x64(True):
        inputs, cotangents = draw(length, gates, jnp.float32)
        exact = [[x.astype(jnp.float64) for x in tree] for tree in (inputs, cotangents)]
        expected = on_one_device(exact[0], ids, exact[1])
        actual = on_devices(8, inputs, ids, cotangents)
        assert_accurate(actual, expected, {"all": 5e-6, "d_log_gate": 3e-5})  # as in test_ops.py


def test_shards_number_their_segments_from_the_token_before():
    ids = jnp.asarray([[7, 7, 7, 7, 8, 8, 9, 9, 9], [1, 1, 2, 3, 3, 3, 3, 3, 1]], jnp.int32)
    numbered = jax.shard_map(
        shard_segment_ids, mesh=mesh_of(sequence=3), in_specs=TIME, out_specs=TIME
    )(ids)
    expected = [[0, 0, 0, 0, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 0, 0, 1]]
    np.testing.assert_array_equal(numbered, expected)


def test_halo_is_zero_where_a_segment_begins():
    own = jnp.arange(8, dtype=jnp.float32).reshape(2, 4) + 1
    first = jnp.asarray([[-1.0], [-2.0]])
    ids = jnp.asarray([[0, 0, 1, 0], [0, 1, 0, 0]], jnp.int32)  # one token per shard
    run = jax.shard_map(halo, mesh=mesh_of(sequence=4), in_specs=(TIME, P(), TIME), out_specs=TIME)
    np.testing.assert_array_equal(run(own, first, ids), [[-1, 1, 0, 3], [-2, 0, 6, 7]])


def test_shards_shorter_than_the_convolution_are_refused():
    def convolve(x):
        return sharded_convolution(x, jnp.ones((4, 5)), jnp.zeros((3, 3, 5)), None)[0]

    run = jax.shard_map(convolve, mesh=mesh_of(sequence=4), in_specs=TIME, out_specs=TIME)
    assert run(np.ones((3, 12, 5))).shape == (3, 12, 5)
    with pytest.raises(ValueError, match="sequence shards of 2 tokens; the convolution needs at l"):
        run(np.ones((3, 8, 5)))
