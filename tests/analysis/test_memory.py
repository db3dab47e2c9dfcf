"""Half-lives, effective rank, and both measured on a model piece by piece."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_runs import HYBRID, small_config

from simplernn_jax.analysis import memory
from simplernn_jax.analysis.memory import effective_rank, half_life, measure_memory
from simplernn_jax.analysis.recording import find_mixers, record
from simplernn_jax.models import LanguageModel

TOKENS = np.random.default_rng(1).integers(0, 30, 23)


@nnx.jit
def all_at_once(model):
    """Log gates and final state of the first layer."""
    call = record(model, jnp.asarray(TOKENS, jnp.int32)[None])[0][0]
    return find_mixers(model)[0].cell.project(call.inputs)[0][3], call.final_state


def test_a_half_life_halves():
    gates = np.array([0.5, 0.25, 1.0])
    np.testing.assert_allclose(half_life(-np.log(gates)), [1, 0.5, math.inf])


@pytest.mark.parametrize(
    ("matrix", "rank"),
    [
        (np.eye(5), 5),
        (np.ones((3, 7)), 1),
        (np.zeros((3, 2)), 0),
        # Shares 3/4 and 1/4 of the singular values: 2**(3/4 * log2(4/3) + 1/4 * 2).
        (np.diag([-6.0, 2.0]), 4 / 3**0.75),
    ],
)
def test_effective_rank_of_known_matrices(matrix, rank):
    assert effective_rank(matrix) == pytest.approx(rank)
    np.testing.assert_allclose(effective_rank(np.stack([matrix, 1e-20 * matrix])), [rank, rank])


@pytest.mark.fewer_cases
@pytest.mark.parametrize(("points", "positions"), [(200, range(1, 24)), (4, [6, 12, 18, 23])])
def test_measured_on_the_way_as_all_at_once(monkeypatch, points, positions):
    monkeypatch.setattr(memory, "_POINTS", points)
    config = small_config(**HYBRID, vocab_size=30, num_heads=2, mixer_options={"context": 7})
    model = LanguageModel(config.model, rngs=nnx.Rngs(0))  # its second layer is attention
    measured = measure_memory(model, TOKENS)
    assert list(measured.positions) == list(positions)
    layer, other = measured.layers
    assert other is None
    log_gate, final_state = all_at_once(model)
    np.testing.assert_allclose(
        layer.half_lives, math.log(2) / -np.mean(log_gate[0], axis=0), rtol=1e-5
    )
    assert layer.norms.shape == layer.ranks.shape == (len(positions), 2)
    norms = np.sqrt(np.sum(np.asarray(final_state[0]) ** 2, axis=(1, 2)))
    np.testing.assert_allclose(layer.norms[-1], norms, rtol=1e-5)
    np.testing.assert_allclose(
        layer.ranks[-1], effective_rank(np.asarray(final_state[0])), rtol=1e-4
    )
