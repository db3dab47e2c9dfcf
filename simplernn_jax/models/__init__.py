"""Flax NNX modules: token mixers, blocks and the language model."""

from simplernn_jax.models.gla_checkpoint import load_gla_checkpoint
from simplernn_jax.models.language_model import LanguageModel
from simplernn_jax.models.mixers.attention import Attention, KVCache
from simplernn_jax.models.mixers.gla import GatedLinearAttention, GLAState
from simplernn_jax.models.mixers.simple_rnn import SimpleRNN, SimpleRNNCell
from simplernn_jax.models.mixers.token_mixer import TokenMixer, register_mixer

__all__ = [
    "Attention",
    "GLAState",
    "GatedLinearAttention",
    "KVCache",
    "LanguageModel",
    "SimpleRNN",
    "SimpleRNNCell",
    "TokenMixer",
    "load_gla_checkpoint",
    "register_mixer",
]
