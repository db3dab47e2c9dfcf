"""Interpretability: how exactly the recurrence's implicit attention map accounts for its outputs.

Attention's weights are what its softmax gives: there is nothing to reconstruct. Those of the
recurrence follow from its gates (`simplernn_jax.analysis`); weights times values must give back
what the layer computed.
"""

import tempfile
from typing import NamedTuple

import numpy as np
from flax import nnx

from benchmarks.attention import corpus
from benchmarks.attention.sides import RECURRENCE, config_of
from simplernn_jax.analysis import decompose_layers
from simplernn_jax.training.gradient import abstract_model
from simplernn_jax.training.preparation import prepare


class Sizes(NamedTuple):
    """How much is measured."""

    training: corpus.Sizes
    """Of the model that is looked into."""
    tokens: int
    """Of the held-out text that it reads."""


QUICK = Sizes(corpus.QUICK._replace(steps=50), 256)
FULL = Sizes(corpus.FULL, 1024)


def measure(sizes: Sizes) -> list[dict[str, float]]:
    """By layer: error of the map against the definition, and of the layer's output."""
    with tempfile.TemporaryDirectory() as folder:
        rate = config_of(RECURRENCE, corpus.LENGTH).optimizer.learning_rate
        trained = corpus.train(RECURRENCE, folder, sizes.training, rate, seed=0)
        _, texts = prepare(trained.config, folder)
        assert texts.validation is not None
        tokens = np.array(texts.validation.tokens[: sizes.tokens])
    graph, _ = abstract_model(trained.config)
    model = nnx.merge(graph, trained.params)
    return [
        {
            "operator_error": float(layer.operator_error),
            "layer_error": float(layer.layer_error),
        }
        for layer in decompose_layers(model, tokens, model.initial_state(1))
    ]
