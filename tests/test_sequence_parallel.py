"""The recurrence over stretches of time on several devices, against the definition on one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from meshes import mesh_of

from simplernn_jax.ops import gated_linear_recurrence
from simplernn_jax.ops.sequence_parallel import (
    halo,
    shard_segment_ids,
    sharded_recurrence,
)

NAMES = ("output", "final_state", "d_q", "d_k", "d_v", "d_log_gate", "d_initial_state")
BATCH, STRETCH, HEADS, KEYS, VALUES = 2, 5, 3, 5, 7
TIME = P(None, "sequence")


def draw(length, gates, dtype, seed=0):
    random = np.random.default_rng([seed, length])
    q = random.normal(size=(BATCH, length, HEADS, KEYS))
    k = 1 / (1 + np.exp(-random.normal(size=q.shape)))
    v = random.normal(size=(BATCH, length, HEADS, VALUES))
    log_gate = -np.exp(random.uniform(*np.log(gates), q.shape))
    state = random.normal(size=(BATCH, HEADS, KEYS, VALUES))
    inputs = [jnp.asarray(x, dtype) for x in (q, k, v, log_gate, state)]
    cotangents = [jnp.asarray(random.normal(size=x.shape), dtype) for x in (v, state)]
    return inputs, cotangents


def results_and_gradients(function, inputs, segment_ids, cotangents):
    results, pullback = jax.vjp(lambda *inputs: function(*inputs, segment_ids), *inputs)
    return (*results, *pullback(tuple(cotangents)))


@jax.jit
def by_definition(inputs, segment_ids, cotangents):
    def run(q, k, v, log_gate, state, segment_ids):
        return gated_linear_recurrence(
            q, k, v, log_gate, initial_state=state, segment_ids=segment_ids, method="scan"
        )

    return results_and_gradients(run, inputs, segment_ids, cotangents)


@functools.partial(jax.jit, static_argnums=0)
def over_devices(devices, inputs, segment_ids, cotangents):
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
    return results_and_gradients(run, inputs, segment_ids, cotangents)


def error(actual, expected):
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert np.isfinite(actual).all()
    scale = np.sqrt(np.mean(expected**2))
    # Where a boundary cuts everything off, both are exactly zero.
    return np.sqrt(np.mean((actual - expected) ** 2)) / scale if scale else np.abs(actual).max()


def boundaries(kind, length):
    """``[B, T]`` ids whose documents begin at stretch edges, beside them, anywhere, everywhere."""
    time = np.arange(length)
    rows = {
        "edges": (time // STRETCH, time // (3 * STRETCH)),
        "beside edges": ((time + 1) // STRETCH, (time + STRETCH - 1) // STRETCH),
        "one document": (0 * time, time // (length - 1)),
        "every token": (time, -time),
        "anywhere": np.cumsum(np.random.default_rng(3).random((2, length)) < 0.1, axis=1),
        # The same id again is another document if one lies between.
        "two ids in turn": ((time // 4) % 2, (time // STRETCH) % 2),
    }[kind]
    return jnp.asarray(np.stack(rows), jnp.int32)


KINDS = ("edges", "beside edges", "one document", "every token", "anywhere", "two ids in turn")


@pytest.mark.parametrize("devices", [3, 8])
@pytest.mark.parametrize("kind", [None, *KINDS])
def test_equals_the_definition_with_documents_anywhere(devices, kind):
    length = devices * STRETCH
    with jax.enable_x64(True):
        inputs, cotangents = draw(length, (1e-6, 27.0), jnp.float64)
        ids = None if kind is None else boundaries(kind, length)
        expected = by_definition(inputs, ids, cotangents)
        actual = over_devices(devices, inputs, ids, cotangents)
        for name, ours, reference in zip(NAMES, actual, expected, strict=True):
            assert error(ours, reference) <= 1e-12, name


@pytest.mark.parametrize("gates", [(1e-7, 1e-2), (1e-6, 27.0), (20.0, 28.0)])
def test_in_float32_it_is_as_exact_as_on_one_device(gates):
    length, ids = 8 * 128, boundaries("one document", 8 * 128)
    with jax.enable_x64(True):
        inputs, cotangents = draw(length, gates, jnp.float32)
        exact = [[x.astype(jnp.float64) for x in tree] for tree in (inputs, cotangents)]
        expected = by_definition(exact[0], ids, exact[1])
        actual = over_devices(8, inputs, ids, cotangents)
        for name, ours, reference in zip(NAMES, actual, expected, strict=True):
            if np.sqrt(np.mean(np.asarray(reference) ** 2)) < 1e-7:
                # Gates of 1e-9 leave nothing of what came before: there is only rounding.
                assert np.abs(ours).max() < 1e-5, name
                continue
            # As for the operator on one device (test_ops.py).
            assert error(ours, reference) <= (3e-5 if name == "d_log_gate" else 5e-6), name


def test_stretches_number_their_segments_from_what_came_before():
    ids = jnp.asarray([[7, 7, 7, 7, 8, 8, 9, 9, 9], [1, 1, 2, 3, 3, 3, 3, 3, 1]], jnp.int32)
    numbered = jax.shard_map(
        shard_segment_ids, mesh=mesh_of(sequence=3), in_specs=TIME, out_specs=TIME
    )(ids)
    expected = [[0, 0, 0, 0, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 0, 0, 1]]
    np.testing.assert_array_equal(numbered, expected)


def test_a_halo_comes_from_the_stretch_before_unless_a_document_begins():
    own = jnp.arange(8, dtype=jnp.float32).reshape(2, 4) + 1
    first = jnp.asarray([[-1.0], [-2.0]])
    ids = jnp.asarray([[0, 0, 1, 0], [0, 1, 0, 0]], jnp.int32)  # one token a stretch
    run = jax.shard_map(halo, mesh=mesh_of(sequence=4), in_specs=(TIME, P(), TIME), out_specs=TIME)
    np.testing.assert_array_equal(run(own, first, ids), [[-1, 1, 0, 3], [-2, 0, 6, 7]])
