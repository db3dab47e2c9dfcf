"""Flax NNX modules: recurrent cell, sequence layers and language model."""

from simplernn_jax.models.attention import Attention, KVCache
from simplernn_jax.models.gla import GatedLinearAttention, GLAState
from simplernn_jax.models.gla_checkpoint import load_gla_checkpoint
from simplernn_jax.models.language_model import LanguageModel
from simplernn_jax.models.simple_rnn import SimpleRNN, SimpleRNNCell

__all__ = [
    "Attention",
    "GLAState",
    "GatedLinearAttention",
    "KVCache",
    "LanguageModel",
    "SimpleRNN",
    "SimpleRNNCell",
    "load_gla_checkpoint",
]
