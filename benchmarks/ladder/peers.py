"""Models that train beside ours, and their settings."""

import math
from typing import NamedTuple

from simplernn_jax.config import Config, DataConfig

from ..train_steps import count_parameters

OURS = "ours"
NANOGPT = "gpt_cpu"
"""Peer whose training time is the unit of the others'."""
_LAYERS = 2
"""Layers of an LSTM or a GRU."""
_WIDTH_MULTIPLE = 16


class Peer(NamedTuple):
    """Sizes and training of one peer; AdamW with the settings of nanoGPT's small runs."""

    model: str
    """``gpt``, ``lstm`` or ``gru``."""
    layers: int
    width: int
    heads: int
    length: int
    """Tokens of a sequence, and the context of attention."""
    batch: int
    steps: int
    """Optimizer steps without a limit of time."""
    rate: float
    """Peak learning rate where none are tried."""
    dropout: float = 0.0
    is_compiled: bool = False
    """True under ``torch.compile``."""


_CPU = Peer("gpt", 4, 128, 4, 64, 12, 2000, 4e-3)
_GPU = Peer("gpt", 6, 384, 6, 256, 64, 5000, 1e-3, dropout=0.2)
"""Both from nanoGPT's README, for characters, except the learning rate of the first: its 1e-3 was
not the best of those tried."""
_RATES = {"gpt": (4e-3, 128), "lstm": (1.6e-2, 240), "gru": (8e-3, 272)}
"""The best of the rates tried on shakespeare, and the width there; docs/results.md has all of them.
Wider peers get a proportionally lower rate, as muP has for matrices under Adam
(arXiv:2203.03466)."""
COMPILED = "_compiled"
NAMES = (OURS, NANOGPT, "gpt_gpu", "gpt_matched", "lstm", "gru")
ON_TORCH = ("gpt", "lstm")


def default_names(tokenizer: str) -> tuple[str, ...]:
    """Ours and the peers that a rung is compared with.

    nanoGPT's settings are for characters. Those for GPUs run only if named: a CPU core takes 18 of
    their steps in ten minutes.
    """
    gpt = NANOGPT if tokenizer == "char" else "gpt_matched"
    return OURS, gpt, f"{gpt}{COMPILED}", "lstm", "gru"


def known_names() -> list[str]:
    """All names, those of compiled peers too."""
    return [*NAMES, *(f"{name}{COMPILED}" for name in NAMES if name.startswith("gpt"))]


def find_peer(name: str, config: Config) -> Peer:
    """The peer of one of `known_names`, for the rung of `config`.

    Without sizes of its own it has as many weights as ours apart from embedding and head, and our
    sequences, batches and number of tokens.
    """
    stem = name.removesuffix(COMPILED)
    is_compiled = stem != name
    if stem in (NANOGPT, "gpt_gpu"):
        return (_CPU if stem == NANOGPT else _GPU)._replace(is_compiled=is_compiled)
    model = "gpt" if stem == "gpt_matched" else stem
    layers = config.model.num_layers if model == "gpt" else _LAYERS
    per_layer = {"gpt": 12, "lstm": 8, "gru": 6}[model] * layers
    ours = count_parameters(config) - config.model.vocab_size * config.model.hidden_dim
    width = _WIDTH_MULTIPLE * max(1, round(math.sqrt(ours / per_layer) / _WIDTH_MULTIPLE))
    rate, tuned_width = _RATES[model]
    return Peer(
        model,
        layers,
        width,
        config.model.num_heads,
        config.data.sequence_length,
        config.data.batch_size,
        config.train.steps,
        rate * min(1.0, tuned_width / width),
        is_compiled=is_compiled,
    )


def data_config(peer: Peer) -> DataConfig:
    """Random windows of the peer's size."""
    return DataConfig(batch_size=peer.batch, sequence_length=peer.length)
