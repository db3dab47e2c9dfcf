"""Programs that train on the text of a configuration: ours, and the settings of its baselines."""

import math
from typing import NamedTuple

from simplernn_jax.config import Config, DataConfig, OptimizerConfig

from ..train_steps import count_parameters

OURS = "ours"
NANOGPT = "gpt_cpu"
"""Baseline whose training time is the unit of the others'."""
_LAYERS = 2
"""Layers of an LSTM or a GRU."""
_WIDTH_MULTIPLE = 16


class Baseline(NamedTuple):
    """Sizes and training of a baseline; AdamW with the settings of nanoGPT's small runs."""

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
    """Peak learning rate."""
    dropout: float = 0.0
    is_compiled: bool = False
    """True under ``torch.compile``."""

    def data_config(self) -> DataConfig:
        """Random windows of this size."""
        return DataConfig(batch_size=self.batch, sequence_length=self.length)

    def schedule(self, steps: int) -> OptimizerConfig:
        """Linear warmup over 5 % of the steps, then a cosine to a tenth of the peak."""
        return OptimizerConfig(
            learning_rate=self.rate, warmup_steps=steps // 20, final_learning_rate=0.1
        )


_CPU = Baseline("gpt", 4, 128, 4, 64, 12, 2000, 4e-3)
_GPU = Baseline("gpt", 6, 384, 6, 256, 64, 5000, 1e-3, dropout=0.2)
"""Both from nanoGPT's README, for characters, except the learning rate of the first: its 1e-3 was
not the best of those tried."""
_RATES = {"gpt": (4e-3, 128), "lstm": (1.6e-2, 240), "gru": (8e-3, 272)}
"""The best of the rates tried on shakespeare, and the width there. Wider baselines get a
proportionally lower rate, as muP has for matrices under Adam (arXiv:2203.03466)."""
_COMPILED = "_compiled"
LABELS = {
    OURS: "SimpleRNN (ours)",
    "lstm": "LSTM",
    "gru": "GRU",
    NANOGPT: "nanoGPT (its CPU settings)",
    f"{NANOGPT}{_COMPILED}": "nanoGPT (its CPU settings, compiled)",
    "gpt_matched": "nanoGPT (our size)",
    f"gpt_matched{_COMPILED}": "nanoGPT (our size, compiled)",
    "gpt_gpu": "nanoGPT (its GPU settings)",
    f"gpt_gpu{_COMPILED}": "nanoGPT (its GPU settings, compiled)",
}
"""Label in plots of every program, by name."""


def default_programs(tokenizer: str) -> tuple[str, ...]:
    """Ours and the baselines of a configuration.

    nanoGPT's settings are for characters. Those for GPUs run only if named: a CPU core takes 18 of
    their steps in ten minutes.
    """
    gpt = NANOGPT if tokenizer == "char" else "gpt_matched"
    return OURS, gpt, f"{gpt}{_COMPILED}", "lstm", "gru"


def find_baseline(name: str, config: Config, rate: float | None = None) -> Baseline:
    """The baseline of this name, one of `LABELS`, of a configuration, with this rate if given.

    Without given sizes it has as many weights as ours apart from embedding and head, and our
    sequences, batches and number of tokens.
    """
    stem = name.removesuffix(_COMPILED)
    is_compiled = stem != name
    if stem in (NANOGPT, "gpt_gpu"):
        found = _CPU if stem == NANOGPT else _GPU
        return found._replace(is_compiled=is_compiled, rate=rate or found.rate)
    model = "gpt" if stem == "gpt_matched" else stem
    layers = config.model.num_layers if model == "gpt" else _LAYERS
    per_layer = {"gpt": 12, "lstm": 8, "gru": 6}[model] * layers
    ours = count_parameters(config) - config.model.vocab_size * config.model.hidden_dim
    width = _WIDTH_MULTIPLE * max(1, round(math.sqrt(ours / per_layer) / _WIDTH_MULTIPLE))
    best_rate, tuned_width = _RATES[model]
    return Baseline(
        model,
        layers,
        width,
        config.model.num_heads,
        config.data.sequence_length,
        config.data.batch_size,
        config.train.steps,
        rate or best_rate * min(1.0, tuned_width / width),
        is_compiled=is_compiled,
    )
