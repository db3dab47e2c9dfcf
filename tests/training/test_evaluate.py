"""Evaluation against scoring token by token, and its independence of batching."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_data import PAD, make_split
from small_runs import mesh_of, small_config

from simplernn_jax.data.batches import document_ends
from simplernn_jax.data.evaluation_batches import Contexts
from simplernn_jax.models import LanguageModel
from simplernn_jax.parallel.mesh import named_shardings, variable_specs
from simplernn_jax.training import evaluate
from simplernn_jax.training.evaluate import Evaluator

CONFIG = small_config(
    "parallel",
    vocab_size=203,
    num_layers=2,
    mixer="attention,simple_rnn",
    mixer_options={"context": 9},
)
EVALUATOR = Evaluator(CONFIG, PAD)
SPLIT = make_split()


@functools.cache
def model():
    return LanguageModel(CONFIG.model, rngs=nnx.Rngs(0))


def params():
    return nnx.state(model(), nnx.Param)


@functools.cache
def nats_one_by_one():
    """-log p of every prediction of `SPLIT`, each document from a zero state, one by one."""
    graph, params = nnx.split(model(), nnx.Param)

    @jax.jit
    def score(token, target, state):
        logits, state = nnx.merge(graph, params)(token.reshape(1, 1), state)
        return -jax.nn.log_softmax(logits[0, 0])[target], state

    tokens = np.asarray(SPLIT.tokens, np.int32)
    nats = []
    for start, end in zip(SPLIT.document_starts, document_ends(SPLIT), strict=True):
        state = model().initial_state(1)
        for position in range(start, end - 1):
            value, state = score(tokens[position], tokens[position + 1], state)
            nats.append(float(value))
    return nats


def evaluation(limit_tokens=0, split=SPLIT):
    return EVALUATOR(params(), split, limit_tokens)


def test_a_mesh_scores_as_one_device(monkeypatch):
    monkeypatch.setattr(evaluate, "BATCH_TOKENS", 60)
    config = small_config("parallel", vocab_size=204, num_heads=2, mlp_dim=12, num_layers=2)
    config.model.mixer, config.model.mixer_options = "simple_rnn,attention", {"context": 9}
    params = nnx.state(LanguageModel(config.model, rngs=nnx.Rngs(0)), nnx.Param)
    alone = Evaluator(config, PAD)(params, SPLIT)
    mesh = mesh_of(fsdp=2, tensor=2, sequence=2)
    placed = jax.device_put(params, named_shardings(variable_specs(params, mesh), mesh))
    together = Evaluator(config, PAD, mesh)(placed, SPLIT)
    assert together.predictions == alone.predictions == SPLIT.num_predictions
    assert together.nats_per_token == pytest.approx(alone.nats_per_token, rel=1e-6)


@pytest.mark.parametrize(("batch_tokens", "max_batch_size"), [(8192, 32), (60, 3), (13, 1)])
def test_equals_scoring_token_by_token(monkeypatch, batch_tokens, max_batch_size):
    monkeypatch.setattr(evaluate, "BATCH_TOKENS", batch_tokens)
    monkeypatch.setattr(evaluate, "MAX_BATCH_SIZE", max_batch_size)
    result, expected = evaluation(), nats_one_by_one()
    assert result.predictions == len(expected) == SPLIT.num_predictions
    assert result.nats_per_token == pytest.approx(np.mean(expected), rel=1e-6)


def test_a_limit_scores_the_same_n_predictions_for_any_batch_size(monkeypatch):
    result = evaluation(limit_tokens=61)
    assert result.predictions == 61
    monkeypatch.setattr(evaluate, "BATCH_TOKENS", 29)
    assert evaluation(limit_tokens=61).nats_per_token == pytest.approx(
        result.nats_per_token, rel=1e-6
    )
    assert evaluation(limit_tokens=10**9) == evaluation()


def test_bits_per_byte_count_the_bytes_of_the_text():
    split = dataclasses.replace(SPLIT, num_bytes=301)
    result = evaluation(split=split)
    bits = sum(nats_one_by_one()) / math.log(2)
    assert result.bits_per_byte == pytest.approx(bits / 301, rel=1e-6)
    limited = evaluation(limit_tokens=61, split=split)
    assert limited.bits_per_byte == pytest.approx(
        limited.nats_per_token * len(nats_one_by_one()) / 301 / math.log(2)
    )


def test_a_uniform_model_scores_the_logarithm_of_its_vocabulary():
    result = EVALUATOR(jax.tree.map(jnp.zeros_like, params()), SPLIT)
    assert result.nats_per_token == pytest.approx(math.log(203), rel=1e-6)
    assert result.perplexity == pytest.approx(203, rel=1e-5)
    assert dataclasses.replace(result, nats_per_token=1e4).perplexity == math.inf


def test_overlapping_contexts_equal_the_model_on_each_from_a_zero_state():
    length, stride = 11, 4
    result = EVALUATOR(params(), SPLIT, contexts=Contexts(length, stride))
    assert result.predictions == SPLIT.num_predictions
    score = nnx.jit(lambda model, tokens: jax.nn.log_softmax(model(tokens)[0][0]))
    nats = []
    for start, end in zip(SPLIT.document_starts, document_ends(SPLIT), strict=True):
        document = np.asarray(SPLIT.tokens[start:end], np.int32)
        scored = 0
        for first in range(0, len(document), stride):
            inputs = document[first : first + length][: len(document) - 1 - first]
            if first + len(inputs) <= scored:
                break
            padded = np.pad(inputs, (0, length - len(inputs)))[None]
            logs = np.asarray(score(model(), padded))
            for place in range(scored - first, len(inputs)):
                nats.append(-logs[place, document[first + place + 1]])
            scored = first + len(inputs)
    assert len(nats) == result.predictions
    assert result.nats_per_token == pytest.approx(np.mean(nats), rel=1e-6)
