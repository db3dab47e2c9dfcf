"""Half-lives, and losses with the state carried, reset or from a short context."""

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
    loss_by_position,
    measure_half_lives,
    token_losses,
)
from simplernn_jax.data.batches import document_ends
from simplernn_jax.models import LanguageModel
from simplernn_jax.training import evaluate
from simplernn_jax.training.evaluate import Evaluator

TOKENS = np.random.default_rng(1).integers(0, 30, 23)


@nnx.jit
def log_gates(model):
    """Log gates of the first layer, ``[T, H, K]``."""
    (call, _), _ = record(model, jnp.asarray(TOKENS, jnp.int32)[None])
    return find_mixers(model)[0].cell.project(call.inputs)[0][3][0]


def test_half_lives_are_measured_piece_by_piece_as_all_at_once(monkeypatch):
    monkeypatch.setattr(memory, "_MAX_TOKENS", 9)
    config = small_config(**HYBRID, vocab_size=30, num_heads=2, mixer_options={"context": 7})
    model = LanguageModel(config.model, rngs=nnx.Rngs(0))  # its second layer is attention
    lives, other = measure_half_lives(model, TOKENS)
    assert other is None
    expected = math.log(2) / -np.mean(log_gates(model), axis=0)
    np.testing.assert_allclose(lives, expected, rtol=1e-5)
    # Gates of 0.5 halve the state at each token, and gates of 1 keep it.
    cell = model.layers[0].mixer.cell
    cell.gate_proj.kernel[...] = jnp.zeros_like(cell.gate_proj.kernel)
    bias = jnp.zeros_like(cell.gate_proj.bias)
    cell.gate_proj.bias[...] = bias.at[0].set(200.0)
    lives, _ = measure_half_lives(model, TOKENS)
    np.testing.assert_allclose(lives.ravel(), [np.inf, *[1] * (lives.size - 1)], rtol=1e-6)


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
