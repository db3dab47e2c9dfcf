"""Token mixers: what a layer does along the time axis. One file each."""

from simplernn_jax.models.mixers import attention, gla, simple_rnn
from simplernn_jax.models.mixers.token_mixer import TokenMixer, register_mixer

__all__ = ["TokenMixer", "attention", "gla", "register_mixer", "simple_rnn"]
