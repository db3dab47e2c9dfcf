"""Flax NNX modules: token mixers, blocks and the language model."""

from simplernn_jax.models.fla_checkpoint import load_fla_checkpoint
from simplernn_jax.models.language_model import LanguageModel
from simplernn_jax.models.mixers.attention import Attention, KVCache
from simplernn_jax.models.mixers.convolved import GLAState
from simplernn_jax.models.mixers.gated_delta_net import GatedDeltaNet
from simplernn_jax.models.mixers.gla import GatedLinearAttention
from simplernn_jax.models.mixers.hgrn2 import HGRN2
from simplernn_jax.models.mixers.mamba2 import Mamba2
from simplernn_jax.models.mixers.retnet import RetNet
from simplernn_jax.models.mixers.simple_rnn import SimpleRNN, SimpleRNNCell
from simplernn_jax.models.mixers.token_mixer import TokenMixer, register_mixer

load_gla_checkpoint = load_fla_checkpoint
"""The older name."""

__all__ = [
    "HGRN2",
    "Attention",
    "GLAState",
    "GatedDeltaNet",
    "GatedLinearAttention",
    "KVCache",
    "LanguageModel",
    "Mamba2",
    "RetNet",
    "SimpleRNN",
    "SimpleRNNCell",
    "TokenMixer",
    "load_fla_checkpoint",
    "load_gla_checkpoint",
    "register_mixer",
]
