"""Memory estimates are lower bounds that reject only what cannot fit."""

import pytest
from flax import nnx
from small_runs import small_config

from simplernn_jax.config import Config
from simplernn_jax.errors import UserError
from simplernn_jax.models import memory_estimate
from simplernn_jax.models.language_model import LanguageModel
from simplernn_jax.models.memory_estimate import (
    check_evaluation,
    check_generation,
    check_training,
    estimate_training,
    evaluation_sequences,
    model_bytes,
)
from simplernn_jax.parallel.mesh import make_mesh
from simplernn_jax.training.optimizer import make_optimizer
from simplernn_jax.training.train_step import check_memory

GIGABYTE = 10**9
ONE = dict.fromkeys(("data", "fsdp", "tensor", "sequence", "pipeline"), 1)


@pytest.fixture(autouse=True)
def memory(monkeypatch):
    """24 GB, whatever this machine has."""
    monkeypatch.setattr(memory_estimate, "device_memory", lambda device: 24 * GIGABYTE)


@pytest.fixture
def mesh():
    return make_mesh(small_config().mesh)


def test_parameters_gradients_and_moments_of_a_step():
    config = Config()
    config.optimizer.name = "adamw"
    config.data.batch_size, config.data.sequence_length = 1, 1
    weights, _ = model_bytes(config.model)
    estimate = estimate_training(config, ONE)
    assert estimate["parameters"] == 3 * weights
    assert estimate["activations"] == pytest.approx(weights, rel=1e-3)
    assert estimate_training(config, ONE | {"fsdp": 4})["parameters"] == 3 * weights / 4


@pytest.mark.parametrize(
    ("section", "field", "value", "part"),
    [
        ("model", "vocab_size", 2 * 10**9, r"parameters [\d.]+ TB"),
        ("data", "sequence_length", 10**9, r"activations [\d.]+ TB"),
    ],
)
def test_a_run_that_cannot_fit_is_rejected_with_its_size(mesh, section, field, value, part):
    config = Config()
    setattr(getattr(config, section), field, value)
    message = rf"this run needs at least .*{part}.*, but this machine has 24 GB; lower config\.data"
    with pytest.raises(UserError, match=message):
        check_training(config, mesh)


def test_a_large_state_is_rejected_if_it_is_allocated(mesh):
    config = Config()
    config.model.mixer, config.model.mixer_options = "attention", {"context": 10**9}
    with pytest.raises(UserError, match=r"state 4\.\d+ TB"):
        check_training(config, mesh)
    config.train.sample_every, config.data.validation_fraction = 0, 0.0
    check_training(config, mesh)


def test_a_run_that_fits_is_accepted(mesh):
    config = Config()
    check_training(config, mesh)
    # A sequence of a million tokens takes 4 GB with its gradient in backward spans.
    config.data.batch_size, config.data.sequence_length = 1, 2**20
    config.train.bptt_window, config.train.bptt = 2**13, "full"
    assert sum(estimate_training(config, ONE).values()) < 4 * GIGABYTE


@pytest.mark.parametrize(
    ("check", "fits", "too_much", "message"),
    [
        (check_generation, (1000, 10**6), (10**7, 1), "generating needs .* generate fewer"),
        (check_generation, (1, 1), (1, 10**12), "generating needs at least 4 TB"),
        (check_evaluation, (10**6,), (10**8,), "scoring needs at least .* lower --window"),
    ],
)
def test_long_generations_and_contexts_are_rejected(check, fits, too_much, message):
    model = LanguageModel(Config().model, rngs=nnx.Rngs(0))
    check(model, *fits)
    with pytest.raises(UserError, match=message):
        check(model, *too_much)


def test_simulated_devices_share_the_memory_of_the_machine():
    config = Config()
    config.data.batch_size = 4 * 10**6
    for devices, has in ((1, "this machine has 24 GB"), (4, "each of 4 devices has 6 GB")):
        config.mesh.data = devices
        with pytest.raises(UserError, match=has):
            check_training(config, make_mesh(config.mesh))


def test_xla_analyzes_the_step_if_the_estimate_is_close(mesh, monkeypatch):
    config = small_config(mode="stream", name="adamw")
    optimizer = make_optimizer(config.optimizer, 7)
    estimate = sum(estimate_training(config, ONE).values())
    monkeypatch.setattr(memory_estimate, "device_memory", lambda device: 1.1 * estimate)
    with pytest.raises(UserError, match=r"a train step needs .* of memory \(by XLA"):
        check_memory(config, optimizer, mesh)
    monkeypatch.setattr(memory_estimate, "device_memory", lambda device: 1000 * estimate)
    check_memory(config, optimizer, mesh)


@pytest.mark.parametrize(("context", "expected"), [(256, 32), (2**16 - 99, 4), (2**20, 1)])
def test_the_states_of_sequences_that_are_scored_together_are_bounded(context, expected):
    config = small_config("parallel", key_dim=128, value_dim=128, num_heads=4)
    config.model.mixer, config.model.mixer_options = "attention", {"context": context}
    assert evaluation_sequences(config.model, 32) == expected
    assert evaluation_sequences(config.model, 3) == min(3, expected)
