"""Training with layers divided among stages: the steps, states and parameters of one device."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiled_collectives import collectives
from small_runs import small_config

from simplernn_jax.config import MeshConfig
from simplernn_jax.data.batches import Batch
from simplernn_jax.parallel.layer_layout import in_layout_of
from simplernn_jax.parallel.mesh import make_mesh
from simplernn_jax.parallel.shardings import shardings_of
from simplernn_jax.training.optimizer import make_optimizer
from simplernn_jax.training.train_step import init_train_state, make_train_step, state_specs

LAYERS, ROWS, LENGTH, WIDTH, VOCAB, STEPS = 4, 8, 24, 8, 13, 5


def make_batch(seed):
    """Documents that begin and end anywhere; some rows are reset."""
    random = np.random.default_rng(seed)
    tokens = random.integers(0, VOCAB, (ROWS, LENGTH + 1), np.int32)
    begins = random.random((ROWS, LENGTH + 1)) < 0.15
    return Batch(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        loss_mask=~begins[:, 1:],
        segment_ids=np.cumsum(begins[:, :-1], axis=1, dtype=np.int32),
        reset=begins[:, 0] | (random.random(ROWS) < 0.3),
    )


def config_of(sizes, **fields):
    config = small_config("residual", num_layers=LAYERS, num_heads=2, vocab_size=VOCAB, **fields)
    config.data.batch_size, config.data.sequence_length = ROWS, LENGTH
    config.data.mode = "stream"
    config.mesh = MeshConfig(**sizes)
    return config


@functools.cache
def program_of(dtype="float32", sizes=(("data", 1),), **fields):
    """(initial state, compiled step) of a mesh."""
    config = config_of(dict(sizes), precision=dtype, **fields)
    mesh = make_mesh(config.mesh, jax.devices()[: np.prod([size for _, size in sizes])])
    optimizer = make_optimizer(config.optimizer, 40)

    def init():
        state = init_train_state(config, optimizer)
        return jax.tree.map(lambda x: x.astype(dtype) if x.dtype == jnp.float32 else x, state)

    states = shardings_of(state_specs(config, optimizer, mesh), mesh)
    state = jax.jit(init, out_shardings=states if mesh.size > 1 else None)()
    step = make_train_step(config, optimizer, mesh)
    return state, step.lower(state, make_batch(0)).compile()


def five_steps(state, step):
    """(last state, metrics of each step) on the host."""
    state, metrics = jax.tree.map(jnp.copy, state), []  # the step gives its input up
    for index in range(STEPS):
        state, measured = step(state, make_batch(index))
        metrics.append(jax.device_get(measured))
    return jax.device_get(state), metrics


@functools.cache
def on_one_device(dtype="float32", **fields):
    return five_steps(*program_of(dtype, **fields))


def distance(tree, reference):
    """Norm of the difference, relative to that of the reference."""
    difference = jax.tree.map(lambda a, b: np.subtract(a, b, dtype=np.float64), tree, reference)
    return float(optax.tree.norm(difference) / optax.tree.norm(reference))


STAGE_4 = (("data", 1), ("stage", 4))
STAGE_2_DATA_4 = (("data", 4), ("stage", 2))


@pytest.mark.parametrize("sizes", [STAGE_4, STAGE_2_DATA_4])
@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-5), ("float64", 1e-11)])
def test_training_on_stages_is_that_on_one_device(sizes, dtype, limit):
    with jax.enable_x64(dtype == "float64"):
        expected, expected_metrics = on_one_device(dtype)
        state, metrics = five_steps(*program_of(dtype, sizes))
        chex.assert_trees_all_close(
            [m.loss for m in metrics], [m.loss for m in expected_metrics], rtol=limit
        )
        state = in_layout_of(expected, state)
        assert distance(state.params, expected.params) < limit
        assert distance(state.carried, expected.carried) < limit
        assert distance(state.opt_state, expected.opt_state) < 10 * limit
        assert optax.tree.norm(expected.carried) > 1


@pytest.mark.parametrize(
    ("sizes", "chunks", "of_layers"),
    [(STAGE_4, 12, False), (STAGE_2_DATA_4, 8, True)],
)
def test_what_the_stages_tell_each_other(sizes, chunks, of_layers):
    """Activations, and sums of gradients over devices that share parameters; nothing else."""
    state, step = program_of("float32", sizes)
    count = dict(sizes)
    rows, time = ROWS // count["data"], LENGTH // chunks
    chunk = f"f32[{rows},{time},{WIDTH}]"
    expected = [
        ("collective-permute", chunk),  # to the next stage, at each tick
        ("collective-permute", chunk),  # its gradient, back
        # The last stage's output, a share for each stage; and the gradients of all shares.
        ("reduce-scatter", f"f32[{chunks // count['stage']},{rows},{time},{WIDTH}]"),
        ("all-gather", f"f32[{chunks},{rows},{time},{WIDTH}]"),
        # Gradients of what all stages share: embedding, which is the head too, and last norm.
        ("all-reduce", f"f32[{VOCAB},{WIDTH}]"),
        ("all-reduce", f"f32[{WIDTH}]"),
    ]
    if of_layers:  # gradients of a stage's layers, over the copies that see other rows
        layers = jax.tree.leaves(state.params["layers"])
        local = [leaf.addressable_data(0).shape for leaf in layers]
        expected += [("all-reduce", f"f32[{','.join(map(str, shape))}]") for shape in local]
    assert collectives(step) == sorted(expected)
