"""Pipelined training equals one device in steps, states and parameters."""

import dataclasses
import functools
from collections import Counter

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_runs import (
    Options,
    compile_step,
    distance,
    first_state,
    mesh_of,
    random_batch,
    run_steps,
    small_config,
)

from benchmarks.train_steps import collectives
from simplernn_jax.config import MeshConfig
from simplernn_jax.models.layer_stack import LayerStack
from simplernn_jax.models.layers import Dense
from simplernn_jax.parallel.named_leaves import in_layout_of, named_leaves
from simplernn_jax.training.optimizer import make_optimizer
from simplernn_jax.training.run import CheckpointLayout

LAYERS, SIZE, LENGTH, WIDTH, VOCAB, STEPS = 4, 8, 24, 8, 12, 3
STAGE_4 = (("pipeline", 4),)
STAGE_2_DATA_4 = (("pipeline", 2), ("data", 4))
STAGE_2_WITH_OTHERS = (("pipeline", 2), ("fsdp", 2), ("tensor", 2))


def make_batch(seed):
    batch = random_batch(seed, SIZE, LENGTH, VOCAB, 0.15)
    return batch._replace(reset=batch.reset | (np.arange(SIZE) % 3 == seed % 3))


def config_of(sizes=(), dtype="float32", **fields):
    shape = {"num_layers": LAYERS, "num_heads": 2, "mlp_dim": 12, "vocab_size": VOCAB}
    rows = {"batch_size": SIZE, "sequence_length": LENGTH, "mode": "stream"}
    config = small_config("parallel", **(shape | rows | fields))
    config.model.precision = dtype  # float64 is for tests: `validate` knows nothing of it
    config.mesh = MeshConfig(**({"data": 1} | dict(sizes)))
    return config


@functools.cache
def start(dtype, **fields):
    config = config_of((), dtype, **fields)
    return first_state(config, make_optimizer(config.optimizer, 40))


@functools.cache
def program_of(sizes=(), dtype="float32", **fields):
    """(compiled step on a mesh, state before the first one)."""
    config, mesh = config_of(sizes, dtype, **fields), mesh_of(**dict(sizes))
    optimizer = make_optimizer(config.optimizer, 40, mesh)
    fields.pop("gradient_accumulation", None)  # no part of the state
    return compile_step(config, optimizer, mesh, start(dtype, **fields), make_batch(0))


@functools.cache
def take_steps(sizes=(), dtype="float32", **fields):
    return run_steps(*program_of(sizes, dtype, **fields), map(make_batch, range(STEPS)))


def assert_equals_one_device(sizes, dtype, limit, model, **fields):
    expected_losses, expected = take_steps((), dtype, **model)
    losses, state = take_steps(sizes, dtype, **model, **fields)
    np.testing.assert_allclose(losses, expected_losses, rtol=limit)
    state = in_layout_of(expected, state)
    assert bool(state.carried) == bool(expected.carried)
    for name in ("params", "opt_state", *(["carried"] if expected.carried else [])):
        assert distance(getattr(state, name), getattr(expected, name)) <= limit
    assert int(state.step) == STEPS


@pytest.mark.parametrize(
    ("sizes", "model", "fields"),
    [
        (STAGE_4, {}, {"gradient_accumulation": 2}),
        ((("pipeline", 2),), {"num_layers": 2, "mode": "window"}, {}),  # no carried state
        (
            STAGE_2_WITH_OTHERS,
            {"num_layers": 2, "mixer": "attention", "mixer_options": Options(context=7)},
            {},
        ),
    ],
    ids=str,
)
def test_training_on_stages_equals_one_device_in_float64(sizes, model, fields):
    with jax.enable_x64(True):
        assert_equals_one_device(sizes, "float64", 1e-11, model, **fields)


@pytest.mark.oldest_python
def test_collectives_of_stages():
    """Activations, and sums of gradients over devices that share parameters; nothing else."""
    step, state = program_of(STAGE_2_DATA_4, "float32")
    stages, data, chunks = 2, 4, 8
    shared, layers = (
        [leaf.addressable_data(0).size * 4 for leaf in jax.tree.leaves(part)]
        for part in (
            {name: part for name, part in state.params.items() if name != "layers"},
            state.params["layers"],
        )
    )
    outputs = SIZE // data * LENGTH * WIDTH * 4
    expected = Counter()
    # To the next stage at each tick; and its gradient, back.
    expected["collective-permute", outputs // chunks] += 2
    # The last stage's output, a share for each stage; and the gradients of all shares.
    expected["reduce-scatter", outputs // stages] += 1
    expected["all-gather", outputs] += 1
    # Gradients of what all use, embedding and last norm; and of a stage's layers, of its copies.
    for size in shared + layers:
        expected["all-reduce", size] += 1
    found = Counter(
        {key: count for key, count in collectives(step.as_text()).items() if key[1] > 8}
    )
    assert found == expected


def test_a_stage_holds_its_layers_only():
    _, state = program_of(STAGE_2_DATA_4, "float32")
    for name, parts in (("params", 2), ("opt_state", 2), ("carried", 2 * 4)):
        for path, leaf in named_leaves(getattr(state, name)).items():
            if "stacked" in path:
                assert leaf.addressable_data(0).size * parts == leaf.size


def test_a_value_that_is_not_finite_on_one_stage_skips_the_update():
    step, first = program_of(STAGE_2_DATA_4, "float32")
    shardings = jax.tree.map(lambda x: x.sharding, first.carried)
    with_nan = jax.tree.map(lambda x: x.at[3, 2].set(jnp.nan), first.carried)
    with_nan = jax.device_put(with_nan, shardings)
    state = dataclasses.replace(jax.tree.map(jnp.copy, first), carried=with_nan)
    batch = make_batch(0)
    state, _ = step(state, batch._replace(reset=np.zeros(SIZE, bool)))
    assert (int(state.skipped_updates), int(state.step)) == (1, 1)
    for name in ("params", "opt_state"):
        chex.assert_trees_all_equal(getattr(state, name), getattr(first, name))
    state, metrics = step(state, batch._replace(reset=np.arange(SIZE) == 3))
    assert np.isfinite(metrics.loss)
    assert (int(state.skipped_updates), int(state.consecutive_skips)) == (1, 0)


def test_no_device_holds_all_layers_while_a_checkpoint_is_written():
    config, mesh = config_of(STAGE_2_DATA_4), mesh_of(**dict(STAGE_2_DATA_4))
    layout = CheckpointLayout(config, make_optimizer(config.optimizer, 40, mesh), mesh)
    _, state = program_of(STAGE_2_DATA_4, "float32")
    saved = layout.to_checkpoint(state)
    leaves = jax.tree.leaves(saved.params)
    assert sum(x.addressable_data(0).nbytes for x in leaves) < 0.6 * sum(x.nbytes for x in leaves)
    again = layout.from_checkpoint(saved)
    for leaf, other in zip(jax.tree.leaves(again), jax.tree.leaves(state), strict=True):
        assert leaf.sharding.is_equivalent_to(other.sharding, leaf.ndim)
        np.testing.assert_array_equal(leaf, other)


def test_layers_that_are_not_alike():
    def layer(width, dtype=jnp.float32):
        return Dense(3, width, ("embed", "mlp"), rngs=nnx.Rngs(0), dtype=dtype)

    LayerStack([layer(5), layer(5)])
    for other in (layer(4), layer(5, jnp.bfloat16)):
        with pytest.raises(ValueError, match="layer 1 differs from layer 0"):
            LayerStack([layer(5), other])
