"""Schedule, weight decay, clipping and the update itself, against plain arithmetic."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from small_runs import random_batch, small_config

from simplernn_jax.config import OptimizerConfig
from simplernn_jax.models.language_model import abstract_model
from simplernn_jax.training.optimizer import decay_mask, learning_rate_schedule, make_optimizer
from simplernn_jax.training.train_step import init_train_state, make_train_step

STEPS = 23


def settings(**fields):
    values = {"learning_rate": 0.5, "warmup_steps": 5, "final_learning_rate": 0.1}
    return OptimizerConfig(**(values | fields))


def test_schedule_rises_to_its_peak_and_falls_along_a_cosine():
    rate = learning_rate_schedule(settings(), 5, STEPS)
    assert float(rate(0)) == pytest.approx(0.5 / 5)
    assert float(rate(5)) == pytest.approx(0.5)
    middle = 5 + (STEPS - 5) // 2
    assert float(rate(middle)) == pytest.approx(0.5 * (0.1 + 0.9 / 2))
    last = 0.5 * (0.1 + 0.9 * (1 + math.cos(math.pi * 17 / 18)) / 2)
    assert float(rate(STEPS - 1)) == pytest.approx(last)
    assert float(rate(STEPS)) == pytest.approx(0.05)
    values = [float(rate(step)) for step in range(STEPS)]
    assert np.all(np.diff(values[:6]) > 0)
    assert np.all(np.diff(values[5:]) < 0)


@pytest.mark.parametrize("total_steps", [1, 3, 5])
def test_schedule_of_a_run_that_ends_in_its_warmup_is_finite_and_positive(total_steps):
    rate = learning_rate_schedule(settings(), 5, total_steps)
    values = [float(rate(step)) for step in range(total_steps)]
    assert all(0 < value <= 0.5 for value in values)


@pytest.mark.parametrize("block", ["plain", "parallel"])
def test_only_matrices_of_dense_layers_are_decayed(block):
    _, params = abstract_model(small_config(block, tie_embeddings=False).model)
    mask = jax.tree_util.tree_flatten_with_path(decay_mask(params))[0]
    names = {jax.tree_util.keystr(path, simple=True, separator="/"): is_on for path, is_on in mask}
    assert any(names.values())
    for name, is_on in names.items():
        assert is_on == ("kernel" in name), name


def as_parameters(tree):
    """Arrays as `nnx.Param`, of which those called kernel are decayed."""

    def make(path, leaf):
        return nnx.Param(jnp.float32(leaf), decay=path[-1].key == "kernel")

    return jax.tree_util.tree_map_with_path(make, tree)


def adamw_by_hand(config, param, gradients, total_steps):
    """Algorithm 2 of arXiv:1711.05101 on one array, with the schedule inside the decay."""
    rate = learning_rate_schedule(config, config.warmup_steps, total_steps)
    first, second = np.zeros_like(param), np.zeros_like(param)
    for count, gradient in enumerate(gradients):
        first = config.beta1 * first + (1 - config.beta1) * gradient
        second = config.beta2 * second + (1 - config.beta2) * gradient**2
        step = first / (1 - config.beta1 ** (count + 1))
        step /= np.sqrt(second / (1 - config.beta2 ** (count + 1))) + config.epsilon
        param = param - float(rate(count)) * (step + config.weight_decay * param)
    return param


def test_updates_are_those_of_adamw():
    config = settings(weight_decay=0.3, clip_norm=0.0)
    random = np.random.default_rng(0)
    start = {"kernel": random.normal(size=(3, 5)), "bias": random.normal(size=5)}
    gradients = [
        {name: random.normal(size=leaf.shape) for name, leaf in start.items()} for _ in range(7)
    ]
    optimizer = make_optimizer(config, 2 * STEPS)
    params, update = as_parameters(start), jax.jit(optimizer.update)
    state, steps = optimizer.init(params), jnp.array([config.warmup_steps, STEPS])
    for gradient in gradients:
        updates, state = update(as_parameters(gradient), state, params, steps=steps)
        params = optax.apply_updates(params, updates)
    expected = adamw_by_hand(config, start["kernel"], [g["kernel"] for g in gradients], STEPS)
    np.testing.assert_allclose(params["kernel"][...], expected, rtol=2e-5)
    config.weight_decay = 0.0  # the bias is not decayed
    expected = adamw_by_hand(config, start["bias"], [g["bias"] for g in gradients], STEPS)
    np.testing.assert_allclose(params["bias"][...], expected, rtol=2e-5)


@pytest.mark.parametrize(("clip_norm", "factor"), [(0.0, 1.0), (1.0, 1 / 5), (7.0, 1.0)])
def test_gradients_are_clipped_by_their_global_norm(clip_norm, factor):
    params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    gradient = {"a": jnp.array([3.0]), "b": jnp.array([-4.0])}  # norm 5
    optimizer = make_optimizer(settings(clip_norm=clip_norm), STEPS)
    _, state = optimizer.update(gradient, optimizer.init(params), params)
    mean = optax.tree.get(state, "mu")
    assert float(mean["a"][0]) == pytest.approx((1 - 0.9) * 3 * factor, rel=1e-5)
    assert float(mean["b"][0]) == pytest.approx((1 - 0.9) * -4 * factor, rel=1e-5)


def test_a_run_can_resume_with_another_clip_norm():
    params = {"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3)}
    trees = [
        jax.tree.structure(make_optimizer(settings(clip_norm=norm), STEPS).init(params))
        for norm in (0.0, 1.0)
    ]
    assert trees[0] == trees[1]


def test_muon_orthogonalizes_updates_of_matrices_and_leaves_the_rest_to_adam():
    config = settings(name="muon", warmup_steps=0, weight_decay=0.3, clip_norm=0.0)
    random = np.random.default_rng(0)

    def parameters(kernel):
        others = {"embedding": random.normal(size=(11, 7)), "bias": random.normal(size=7)}
        return as_parameters({"dense": {"kernel": kernel}} | others)

    params = parameters(random.normal(size=(7, 11)))
    # Directions of very different strength: Adam would follow the strong ones.
    left, _, right = np.linalg.svd(random.normal(size=(7, 11)), full_matrices=False)
    kernel = (left * np.logspace(0, -1.5, 7)) @ right
    gradient = parameters(kernel)

    optimizer = make_optimizer(config, STEPS)
    updates, _ = jax.jit(optimizer.update)(gradient, optimizer.init(params), params)

    decay = -config.learning_rate * config.weight_decay * params["dense"]["kernel"][...]
    turned = np.asarray(updates["dense"]["kernel"][...] - decay)
    strengths = np.linalg.svd(turned, compute_uv=False)
    # 0.2 sqrt(max(rows, columns)) for a root mean square of about 0.2 (arXiv:2502.16982).
    unit = config.learning_rate * 0.2 * math.sqrt(11)
    assert 0.6 * unit < strengths.min()
    assert strengths.max() < 1.3 * unit
    assert np.sum(turned * kernel) < 0
    for name in ("embedding", "bias"):
        step = config.learning_rate  # Adam's first step is a sign
        np.testing.assert_allclose(
            updates[name][...], -step * np.sign(gradient[name][...]), rtol=2e-5
        )


def change_of_features(width):
    """Root mean square, after one step of Muon."""
    sizes = {"hidden_dim": width, "key_dim": width, "value_dim": width, "mlp_dim": 2 * width}
    fields = {"name": "muon", "learning_rate": 1e-2, "warmup_steps": 0, "vocab_size": 61}
    config = small_config("parallel", num_heads=2, num_layers=2, **sizes, **fields)
    optimizer = make_optimizer(config.optimizer, STEPS)
    state, batch = init_train_state(config, optimizer), random_batch(0, 3, 19, 61)
    graph, _ = abstract_model(config.model)
    features = jax.jit(lambda p: nnx.merge(graph, p).hidden_states(jnp.asarray(batch.tokens))[0])
    before = features(state.params)
    state, _ = make_train_step(config, optimizer)(state, batch)
    return float(jnp.sqrt(jnp.mean((features(state.params) - before) ** 2)))


def test_features_change_by_as_much_at_every_width():
    """The coordinate check of muP (arXiv:2203.03466, D.1): one learning rate suits all widths."""
    changes = [change_of_features(width) for width in (32, 128, 512)]
    assert max(changes) < 1.3 * min(changes)  # without a scale by the width 2.6
