"""``--size=auto``: the size of a new run, by its minutes, its text and the speed of the machine."""

import copy
import math
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
from absl import logging

from simplernn_jax.config import Config, by_field
from simplernn_jax.data.corpora import open_corpus, parse_mixture
from simplernn_jax.ops.native import has_fast_bfloat16


class Size(NamedTuple):
    """Layers of a candidate, and the learning rate of Muon and the tokenizer that suit them."""

    num_layers: int
    width: int
    num_heads: int
    learning_rate: float
    tokenizer: str
    """For texts of at least `_BYTE_LEVEL` bytes; shorter ones are trained on by bytes."""
    bytes_per_token: float

    @property
    def parameters(self) -> int:
        """Parameters apart from the embedding."""
        return 14 * self.num_layers * self.width**2


SIZES = (
    Size(2, 64, 2, 1.6e-2, "bpe:512", 1.9),
    Size(4, 128, 4, 1.6e-2, "bpe:1024", 2.4),
    Size(6, 192, 4, 1e-2, "bpe:2048", 3.0),
    Size(6, 320, 5, 9e-3, "bpe:4096", 3.4),
    Size(6, 512, 8, 8e-3, "bpe:8192", 3.8),
)
"""The second is the size of `configs/base.py`, the third of `hour`, the last about `small`."""
_BYTE_LEVEL = 2_000_000
_START_SECONDS = 20
"""Estimated time for start, tokenization and compilation, besides a part of the minutes."""
_TOKENS_PER_PARAMETER = 1.5
"""Tokens trained on per parameter at the compute-optimal size."""
_ABOVE_OPTIMUM = 1.5
"""Factor by which a size may exceed it: the sizes are factors of 2 to 4 apart."""
_PARAMETERS_PER_BYTE = 1.0
"""Parameters per byte of text, above which a model would overfit."""
_REGULARIZATION = ((12, 0.2, 0.3), (4, 0.1, 0.1), (0, 0.0, 0.1))
"""Passes over the text, from which on dropout and weight decay have these values."""


def choose(seconds: float, num_bytes: int, flops: float) -> Size:
    """Choose the size for `seconds` of steps at `flops` operations per second on `num_bytes`."""
    optimum = math.sqrt(seconds * flops / (6 * _TOKENS_PER_PARAMETER))
    limit = min(_ABOVE_OPTIMUM * optimum, _PARAMETERS_PER_BYTE * num_bytes)
    return [size for size in SIZES if size is SIZES[0] or size.parameters <= limit][-1]


def auto_size(config: Config, workdir: str, flops: float, size: Size | None = None) -> Config:
    """Return a copy of the configuration of a new run with `size`, or what `choose` finds.

    Fields that are given stay. `flops` are the operations per second of its steps.

    Raises:
      UserError: the text cannot be found.
    """
    before, config, num_bytes = by_field(config), copy.deepcopy(config), 0
    mixture = parse_mixture(config.data.source) or [(config.data.source, 1.0)]
    for source, _ in mixture:
        data = copy.copy(config.data)
        data.source = source
        corpus = open_corpus(data, exclude=(workdir,))
        if not corpus.total_bytes:
            corpus.fingerprint()  # which measures texts from Python
        num_bytes += corpus.total_bytes
    seconds = max(57 * config.train.minutes - _START_SECONDS, 15 * config.train.minutes)
    size = size or choose(seconds, num_bytes, flops)
    tokens = seconds * flops / (6 * size.parameters)
    by_bytes = num_bytes < _BYTE_LEVEL
    passes = tokens * (1 if by_bytes else size.bytes_per_token) / max(num_bytes, 1)
    dropout, decay = next(rest for least, *rest in _REGULARIZATION if passes >= least)
    is_fast = has_fast_bfloat16() or jax.default_backend() != "cpu"
    chosen = {
        **dict.fromkeys(("hidden_dim", "key_dim", "value_dim"), size.width),
        **{"num_layers": size.num_layers, "num_heads": size.num_heads, "mlp_dim": 4 * size.width},
        **{"dropout": dropout, "precision": "bfloat16" if is_fast else "float32"},
        **{"batch_size": 8, "tokenizer": "byte" if by_bytes else size.tokenizer},
        # Fewer than a thousand steps are too few.
        "sequence_length": 512 if tokens > 1000 * 8 * 512 else 256,
        **{"name": "muon", "learning_rate": size.learning_rate, "warmup_steps": 100},
        "weight_decay": decay,
    }
    for part in (config.model, config.data, config.optimizer):
        for name, value in chosen.items():
            if name in vars(part) and not part.is_given(name):
                setattr(part, name, value)
    config.train.size = "given"
    changed = [f"{key}={new}" for key, new in by_field(config).items() if new != before[key]]
    logging.info("size for %.3g MB of text: %s", num_bytes / 1e6, ", ".join(changed))
    return config


def measure_flops() -> float:
    """Return the operations per second of train steps: half of those of large float32 matmuls.

    In bfloat16, where that is fast, steps were measured to be 1.4 times as fast.
    """
    x, best = jnp.ones((1024, 1024), jnp.float32), math.inf
    multiply = jax.jit(lambda a: (a @ a) * 1e-3)
    for _ in range(50):
        begun = time.monotonic()
        multiply(x).block_until_ready()
        best = min(best, time.monotonic() - begun)
    return (0.7 if has_fast_bfloat16() else 0.5) * 2 * 1024**3 / best
