"""Half-lives, effective rank, and losses with the state carried, reset or from a short context."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_data import PAD, make_split
from small_runs import HYBRID, small_config

from simplernn_jax.analysis import memory
from simplernn_jax.analysis.decomposition import find_mixers, record
from simplernn_jax.analysis.memory import (
    SHORT_CONTEXT,
    context_gains,
    effective_rank,
    half_life,
    loss_by_position,
    measure_memory,
    token_losses,
)
from simplernn_jax.data.batches import document_ends
from simplernn_jax.models import LanguageModel
from simplernn_jax.training import evaluate
from simplernn_jax.training.evaluate import Evaluator

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


CONFIG = small_config(vocab_size=203)
SPLIT = make_split()
EVALUATOR = Evaluator(CONFIG, PAD)


@functools.cache
def model():
    return LanguageModel(CONFIG.model, rngs=nnx.Rngs(0))


def params():
    return nnx.state(model(), nnx.Param)


@jax.jit
def log_probabilities(model, tokens):
    return jax.nn.log_softmax(model(tokens[None])[0][0])


def nats(tokens):
    """Return -log p of all tokens but the first, from a zero state."""
    tokens = np.asarray(tokens, np.int32)
    # Padded to few lengths, so that few programs are compiled; the model is causal.
    size = 8 ** math.ceil(math.log(max(len(tokens), 2), 8))
    logs = np.asarray(log_probabilities(model(), np.resize(tokens, size)), np.float64)
    return -logs[np.arange(len(tokens) - 1), tokens[1:]]


@functools.cache
def nats_by_position(reset_every):
    """Return (tokens of the document before it, loss) of every prediction of `SPLIT`."""
    pairs = []
    for start, end in zip(SPLIT.document_starts, document_ends(SPLIT), strict=True):
        for first in range(start, end - 1, reset_every):
            piece = nats(SPLIT.tokens[first : min(first + reset_every + 1, end)])
            pairs += [(first - start + 1 + i, value) for i, value in enumerate(piece)]
    return np.asarray(pairs)


@pytest.mark.parametrize(("batch_tokens", "max_rows"), [(8192, 32), (39, 3)])
def test_loss_by_position_bins_every_prediction(monkeypatch, batch_tokens, max_rows):
    monkeypatch.setattr(evaluate, "BATCH_TOKENS", batch_tokens)
    monkeypatch.setattr(evaluate, "MAX_BATCH_SIZE", max_rows)
    loss = loss_by_position(EVALUATOR, params(), SPLIT, 0, reset_every=5)
    positions, carried = nats_by_position(10**6).T
    reset_positions, reset = nats_by_position(5).T
    assert list(loss.starts) == [1, 2, 4, 8, 16, 32, 64]
    assert loss.counts.sum() == SPLIT.num_predictions
    for index, start in enumerate(loss.starts):
        for at, nats, mean in (
            (positions, carried, loss.carried),
            (reset_positions, reset, loss.reset),
        ):
            inside = nats[(at >= start) & (at < 2 * start)]
            assert loss.counts[index] == len(inside)
            assert mean[index] == pytest.approx(inside.mean(), rel=1e-5)
    assert abs(loss.reset[-1] - loss.carried[-1]) > 1e-3


def test_gains_compare_the_full_context_with_a_short_one(monkeypatch):
    monkeypatch.setattr(memory, "_MAX_GAINS", 10)
    tokens = np.resize(SPLIT.tokens, 511)
    losses = token_losses(EVALUATOR, params(), tokens)
    np.testing.assert_allclose(losses, nats(tokens), rtol=1e-5)
    gains = context_gains(EVALUATOR, params(), tokens, losses)
    short = [nats(tokens[at - SHORT_CONTEXT : at + 1])[-1] for at in range(501, 511)]
    np.testing.assert_allclose(gains, short - losses[-10:], rtol=1e-4, atol=1e-5)
    few = tokens[: SHORT_CONTEXT + 1]
    assert not len(context_gains(EVALUATOR, params(), few, losses[:SHORT_CONTEXT]))
