"""Flax NNX modules: the cell, the layer over time, the language model."""

from simplernn_jax.models.language_model import LanguageModel
from simplernn_jax.models.simple_rnn import SimpleRNN, SimpleRNNCell

__all__ = ["LanguageModel", "SimpleRNN", "SimpleRNNCell"]
