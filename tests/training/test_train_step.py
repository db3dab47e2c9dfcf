"""One optimizer step: its loss and gradient, the state it carries, and skipped updates."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from references import assert_same_bytes
from small_runs import Options, mesh_of, random_batch, small_config

from simplernn_jax.models.language_model import abstract_model
from simplernn_jax.training.losses import cross_entropy
from simplernn_jax.training.optimizer import make_optimizer
from simplernn_jax.training.train_step import choose_microbatches, init_train_state, make_train_step

SIZE, LENGTH, VOCAB = 6, 5, 11
SGD = optax.sgd(1.0)
"""Under it the change of the parameters is the gradient."""

KINDS = {
    "plain": {},
    "attention": {"block": "residual", "mixer": "attention", "mixer_options": Options(context=3)},
    "hybrid": {
        "block": "residual",
        "num_layers": 2,
        "mixer": "simple_rnn,attention",
        "mixer_options": Options(context=7),
    },
}
"""Attention contexts shorter and longer than the sequences of a batch."""


def config_of(block="plain", **fields):
    return small_config(
        block, **({"vocab_size": VOCAB, "batch_size": SIZE, "sequence_length": LENGTH} | fields)
    )


@functools.cache
def program_of(block="plain", sgd=False, **fields):
    """(initial state, step), compiled once."""
    config = config_of(block, **({"learning_rate": 0.03} | fields))
    optimizer = SGD if sgd else make_optimizer(config.optimizer, 400)
    return init_train_state(config, optimizer), make_train_step(config, optimizer)


def run_of(*arguments, **fields):
    """`program_of` with a step that leaves what it is given alone."""
    first, step = program_of(*arguments, **fields)
    return first, lambda state, batch: step(copy(state), batch)


def copy(tree):
    return jax.tree.map(jnp.copy, tree)


def make_batch(seed=0, reset=True):
    batch = random_batch(seed, SIZE, LENGTH, VOCAB)
    return batch._replace(reset=batch.reset | reset)


@functools.partial(jax.jit, static_argnames="kind")
def forward(params, tokens, segment_ids, carried=None, kind="plain"):
    """(logits, state) of the model."""
    graph, _ = abstract_model(config_of(**KINDS[kind]).model)
    return nnx.merge(graph, params)(tokens, carried, segment_ids)


def loss_of(params, batch, carried=None, kind="plain"):
    """Mean loss of a batch, by the model alone."""
    logits, _ = forward(params, batch.tokens, batch.segment_ids, carried, kind)
    nats = jnp.sum(cross_entropy(logits, batch.targets, batch.loss_mask))
    return nats / batch.loss_mask.sum().astype(nats.dtype)


def change(before, after):
    """Return what an SGD step with learning rate 1 took for the gradient."""
    return jax.tree.map(jnp.subtract, before.params, after.params)


def test_first_step_of_a_known_model():
    state, step = run_of("parallel")
    state, metrics = step(state, make_batch())
    _, second = step(state, make_batch(1))
    found = [float(x) for x in (metrics.loss, metrics.gradient_norm, second.loss)]
    expected = [2.967241, 1.276264, 3.062203]
    np.testing.assert_allclose(
        found,
        expected,
        rtol=1e-4,
        err_msg="The first steps of a fixed model on a fixed batch changed. Write the new values "
        "here only if the change was meant to alter initialization, the model, the loss or the "
        "optimizer, and say so in the commit; a refactoring or a faster way leaves them as "
        "they are.",
    )


@pytest.mark.parametrize("kind", ["plain", "hybrid"])
def test_loss_and_gradient_are_means_over_predictions(kind):
    state, step = run_of(sgd=True, mode="stream", **KINDS[kind])
    batch = make_batch()
    after, metrics = step(state, batch)
    loss_and_gradient = jax.jit(jax.value_and_grad(functools.partial(loss_of, kind=kind)))
    loss, gradient = loss_and_gradient(state.params, batch)
    chex.assert_trees_all_close(change(state, after), gradient, atol=1e-6)
    assert float(metrics.loss) == pytest.approx(float(loss), rel=1e-6)
    assert float(metrics.gradient_norm) == pytest.approx(float(optax.tree.norm(gradient)), rel=1e-5)
    assert int(metrics.predictions) == batch.loss_mask.sum()


def test_gradient_accumulation_equals_the_whole_batch():
    one = run_of(sgd=True, mode="stream", **KINDS["hybrid"])
    three = run_of(sgd=True, mode="stream", gradient_accumulation=3, **KINDS["hybrid"])
    batch = make_batch(reset=False)
    batch.loss_mask[:2] = False  # nothing to learn in the first group
    batch.loss_mask[2:4, 1:] = False  # little in the second
    state, _ = one[1](one[0], make_batch(1))  # a carried state that is not zero
    whole, metrics = one[1](state, batch)
    in_groups, group_metrics = three[1](state, batch)
    chex.assert_trees_all_close(in_groups, whole, atol=1e-6)
    chex.assert_trees_all_close(group_metrics, metrics, rtol=1e-5)


@pytest.mark.parametrize(
    ("size", "length", "window", "expected"),
    [
        (8, 128, 0, 1),  # 1,024 tokens
        (8, 182, 0, 2),  # 1,456 or 728
        (6, 512, 0, 3),
        (17, 61, 0, 1),  # 1,037 or 61
        (3, 1031, 0, 3),  # one sequence
        (8, 1024, 64, 1),  # the activations of one window
        (10**9 + 7, 8, 0, 10**9 + 7),  # no divisor but itself
    ],
)
def test_microbatches_on_one_cpu_device_have_about_1024_tokens(size, length, window, expected):
    fields = {"batch_size": size, "sequence_length": length, "bptt_window": window}
    config = small_config(**fields)
    assert choose_microbatches(config, None).train.gradient_accumulation == expected
    assert choose_microbatches(config, mesh_of(data=1)).train.gradient_accumulation == expected
    assert choose_microbatches(config, mesh_of(data=2)).train.gradient_accumulation == 1
    given = small_config(**fields, gradient_accumulation=1)
    assert choose_microbatches(given, None) is given


def test_a_batch_without_predictions_changes_no_parameter():
    state, step = run_of(sgd=True, mode="stream")
    batch = make_batch()
    batch.loss_mask[:] = False
    after, metrics = step(state, batch)
    assert (float(metrics.loss), int(metrics.predictions)) == (0.0, 0)
    assert_same_bytes(after.params, state.params)
    assert int(after.skipped_updates) == 0


@pytest.mark.parametrize("kind", ["attention", "hybrid"])
def test_a_stream_continues_from_the_state_of_its_last_batch(kind):
    state, step = run_of(sgd=True, mode="stream", **KINDS[kind])
    first, second = make_batch(0), make_batch(1, reset=False)
    # Ids go on counting, so that no boundary falls between the two.
    second = second._replace(segment_ids=second.segment_ids + first.segment_ids[:, -1:])
    carried = step(state, first)[0].carried
    after, metrics = step(dataclasses.replace(state, carried=carried), second)
    tokens = np.concatenate([first.tokens, second.tokens], axis=1)
    segment_ids = np.concatenate([first.segment_ids, second.segment_ids], axis=1)
    logits, final = forward(state.params, tokens, segment_ids, kind=kind)
    # Sums of numbers up to 10: a few units in their last place, which on some processors is 1.5e-6.
    chex.assert_trees_all_close(after.carried, final, rtol=1e-5, atol=3e-6)
    nats = jnp.sum(cross_entropy(logits[:, LENGTH:], second.targets, second.loss_mask))
    assert float(metrics.loss) == pytest.approx(float(nats) / second.loss_mask.sum(), rel=1e-5)


def with_nan_in_the_carried_state(state):
    return dataclasses.replace(state, carried=jax.tree.map(lambda x: x + jnp.nan, state.carried))


def with_a_gradient_beyond_float32(state):
    # The loss is large and finite; the squares of its gradient are not.
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: x * 1e30 if "head" in jax.tree_util.keystr(path) else x, state.params
    )
    return dataclasses.replace(state, params=params)


@pytest.mark.parametrize(
    ("spoil", "loss_is_finite"),
    [(with_nan_in_the_carried_state, False), (with_a_gradient_beyond_float32, True)],
)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_value_that_is_not_finite_changes_only_the_counters(spoil, loss_is_finite, optimizer):
    state, step = run_of(mode="stream", name=optimizer)
    state = spoil(step(state, make_batch(3))[0])
    after, metrics = step(state, make_batch(reset=False))
    assert bool(np.isfinite(metrics.loss)) == loss_is_finite
    assert not np.isfinite(metrics.gradient_norm)
    for name in ("params", "opt_state", "carried", "rng"):
        assert_same_bytes(getattr(after, name), getattr(state, name))
    assert (int(after.step), int(after.skipped_updates), int(after.consecutive_skips)) == (2, 1, 1)
    assert (int(metrics.skipped_updates), int(metrics.consecutive_skips)) == (1, 1)


def test_a_finite_step_ends_consecutive_skips():
    state, step = run_of(mode="stream")
    state = with_nan_in_the_carried_state(state)
    for _ in range(3):
        state, metrics = step(state, make_batch(reset=False))
    assert (int(metrics.skipped_updates), int(metrics.consecutive_skips)) == (3, 3)
    before = copy(state.params)
    state, metrics = step(state, make_batch(reset=True))  # zeroes the spoilt state
    assert np.isfinite(metrics.loss)
    assert (int(metrics.skipped_updates), int(metrics.consecutive_skips)) == (3, 0)
    assert int(state.step) == 4
    assert all(
        np.any(np.asarray(one) != np.asarray(other))
        for one, other in zip(jax.tree.leaves(state.params), jax.tree.leaves(before), strict=True)
    )


def test_dropout_follows_from_seed_and_step():
    state, step = run_of("parallel", dropout=0.5, learning_rate=0.0)
    batch = make_batch()
    after, metrics = step(state, batch)
    again, same = step(state, batch)
    assert_same_bytes((again, same), (after, metrics))
    assert float(step(after, batch)[1].loss) != float(metrics.loss)
    other_seed = init_train_state(
        config_of("parallel", dropout=0.5, seed=1),
        make_optimizer(config_of(learning_rate=0.0).optimizer, 400),
    )
    other_dropout = dataclasses.replace(state, rng=other_seed.rng)
    assert float(step(other_dropout, batch)[1].loss) != float(metrics.loss)


def test_bfloat16_computes_nearly_the_same_and_keeps_float32():
    state, step = run_of(mode="stream")
    low_state, low_step = run_of(mode="stream", precision="bfloat16")
    chex.assert_trees_all_equal(low_state.params, state.params)
    _, metrics = step(state, make_batch())
    after, low_metrics = low_step(low_state, make_batch())
    assert float(low_metrics.loss) == pytest.approx(float(metrics.loss), rel=1e-2)
    assert float(low_metrics.loss) != float(metrics.loss)
    kept = jax.tree.leaves((after.params, after.carried, low_metrics.loss))
    assert {leaf.dtype for leaf in kept} == {jnp.dtype("float32")}


def test_the_old_state_is_donated():
    first, step = program_of(sgd=True, mode="stream")
    state = copy(first)
    new_state, _ = step(state, make_batch())
    # Some of the small ones may be kept; what takes memory must not be there twice.
    for name in ("params", "carried"):
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(getattr(state, name))), name
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(new_state))
