"""Backward windows and rematerialization: the losses and gradients of whole sequences, or exactly
those of truncated BPTT, on one device and on meshes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from small_runs import (
    compile_step,
    distance,
    first_state,
    mesh_of,
    random_batch,
    run_steps,
    small_config,
)

from benchmarks.train_steps import compile_quickly, megabytes
from simplernn_jax.data.batches import Batch
from simplernn_jax.models.language_model import abstract_model
from simplernn_jax.ops.segments import reset_state, segment_starts
from simplernn_jax.parallel.named_leaves import in_layout_of
from simplernn_jax.training.losses import cross_entropy

SIZE, LENGTH, WINDOW, VOCAB = 4, 24, 8, 12
SGD = optax.sgd(1.0)
"""Under it the change of the parameters is the gradient."""


def config_of(sizes=(), **fields):
    shape = {"block": "parallel", "num_layers": 2, "num_heads": 2, "mlp_dim": 12}
    rows = {"vocab_size": VOCAB, "batch_size": SIZE, "sequence_length": LENGTH, "mode": "stream"}
    # float64 is for tests: `validate` knows nothing of it.
    return small_config(**shape | rows | {"precision": "float64"} | dict(sizes) | fields)


def make_batch():
    batch = random_batch(0, SIZE, LENGTH, VOCAB, 0.15)
    return batch._replace(reset=batch.reset | (np.arange(SIZE) == 1))


@functools.cache
def start():
    """Before the first step, with a carried state that is not zero; numpy, float64."""
    state = first_state(config_of(), SGD)
    carried = jax.tree.map(
        lambda x: np.random.default_rng(x.size).normal(size=x.shape), state.carried
    )
    return dataclasses.replace(state, carried=carried)


@functools.cache
def step_of(sizes=(), **fields):
    """Batch to (loss, gradient, carried) of one step."""
    config = config_of(sizes, **fields)
    mesh = mesh_of(**dict(sizes)) if sizes else None
    state = start()
    if config.data.mode != "stream":
        state = dataclasses.replace(state, carried=())
    step, before = compile_step(config, SGD, mesh, state, make_batch())

    def take(batch):
        (loss,), after = run_steps(step, before, [batch])
        after = in_layout_of(state, after)
        return loss, jax.tree.map(np.subtract, state.params, after.params), after.carried

    return take


@functools.cache
def whole_sequences():
    with jax.enable_x64(True):
        return step_of()(make_batch())


def assert_same(ours, reference):
    assert ours[0] == pytest.approx(reference[0], rel=1e-11)
    for one, other in zip(ours[1:], reference[1:], strict=True):
        assert distance(one, other) <= 1e-11


def loss_of_window(params, batch, carried, predictions):
    graph, _ = abstract_model(config_of().model)
    logits, carried = nnx.merge(graph, params)(batch.tokens, carried, batch.segment_ids)
    nats = jnp.sum(cross_entropy(logits, batch.targets, batch.loss_mask))
    return nats / predictions.astype(nats.dtype), carried


@functools.cache
def window_by_window():
    """Loss and gradient as truncated BPTT defines them, by calls of the model alone."""
    state, batch = start(), make_batch()
    params, carried = jax.tree.map(jnp.asarray, (state.params, state.carried))
    begins = np.array(segment_starts(jnp.asarray(batch.segment_ids)))
    begins[:, 0] = batch.reset
    of_window = jax.jit(jax.value_and_grad(loss_of_window, has_aux=True))
    losses, gradients = [], []
    for first in range(0, LENGTH, WINDOW):
        part = Batch(*(x[:, first : first + WINDOW] for x in batch[:4]), reset=begins[:, first])
        carried = reset_state(carried, part.reset)
        (loss, carried), gradient = of_window(params, part, carried, batch.loss_mask.sum())
        losses.append(float(loss))
        gradients.append(gradient)
    total = jax.tree.map(lambda *leaves: np.sum(leaves, axis=0), *gradients)
    return sum(losses), total, carried


@pytest.mark.oldest_python
@pytest.mark.parametrize(
    ("sizes", "remat"),
    [
        ((), "none"),
        ((("sequence", 2), ("data", 2)), "none"),
        ((("pipeline", 2), ("fsdp", 2)), "block"),
    ],
)
def test_truncated_windows_are_the_sum_of_their_own_gradients(sizes, remat):
    with jax.enable_x64(True):
        found = step_of(sizes, bptt_window=WINDOW, remat=remat)(make_batch())
        assert_same(found, window_by_window())
    whole = whole_sequences()
    assert found[0] == pytest.approx(whole[0], rel=1e-12)
    assert distance(found[2], whole[2]) < 1e-12
    # Truncation changes the gradient, by less than its norm.
    assert 1e-3 < distance(found[1], whole[1]) < 1


EXACT = {"bptt_window": WINDOW, "bptt": "full"}


@pytest.mark.oldest_python
def test_exact_windows_with_gradient_accumulation_and_no_carried_state():
    with jax.enable_x64(True):
        found = step_of(mode="window", gradient_accumulation=2, **EXACT)(make_batch())
        expected = step_of()(make_batch()._replace(reset=np.ones(SIZE, bool)))
    assert found[2] == ()
    assert found[0] == pytest.approx(expected[0], rel=1e-12)
    assert distance(found[1], expected[1]) < 1e-11


@pytest.mark.parametrize(
    ("sizes", "fields"),
    [
        ((), {"remat": "block"}),
        ((("sequence", 2), ("fsdp", 2), ("tensor", 2)), EXACT | {"remat": "block"}),
    ],
)
def test_exact_windows_and_rematerialization_leave_the_gradient(sizes, fields):
    with jax.enable_x64(True):
        assert_same(step_of(sizes, **fields)(make_batch()), whole_sequences())


def working_memory(**fields):
    """Working memory of a step on one long sequence, by XLA's memory analysis."""
    long = {"batch_size": 1, "sequence_length": 512, "mode": "window", "precision": "float32"}
    return megabytes(compile_quickly(config_of(**long | fields)))


@pytest.mark.oldest_python
def test_windows_and_rematerialization_need_less_memory():
    everything, block, truncated, exact = (
        working_memory(**fields)
        for fields in (
            {},
            {"remat": "block"},
            {"bptt_window": 32},
            {"bptt_window": 32, "bptt": "full"},
        )
    )
    assert block < 0.7 * everything
    assert max(truncated, exact) < 0.2 * everything
