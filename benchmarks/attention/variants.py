"""Model variants: `base` with its recurrence, and with attention over the whole sequence."""

from typing import Any

from benchmarks.train_steps import load_config
from simplernn_jax.config import Config

RECURRENCE, ATTENTION = "SimpleRNN", "attention"
VARIANTS = (RECURRENCE, ATTENTION)
_CONFIGS = {RECURRENCE: "base", ATTENTION: "attention"}


def config_of(variant: str, length: int, batch: int = 1, **model: Any) -> Config:
    """Configuration of a variant; both have the same number of parameters."""
    return load_config(_CONFIGS[variant], batch, length, attention_context=length, **model)
