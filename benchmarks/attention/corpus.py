"""Loss on the default corpus: as many parameters and as many tokens on both sides, several seeds.

Each side is trained as `configs/base.py` says, at the learning rate that is best for it among
some, by the loss of the first seed.
"""

import statistics
import tempfile
import time
from typing import Any, NamedTuple

import jax
from flax import nnx

from benchmarks.attention.sides import SIDES, config_of
from benchmarks.training import count_parameters
from simplernn_jax.config import Config
from simplernn_jax.data import TokenizedCorpus
from simplernn_jax.data.batches import make_batches
from simplernn_jax.training.evaluate import Evaluator
from simplernn_jax.training.optimizer import make_optimizer
from simplernn_jax.training.preparation import prepare
from simplernn_jax.training.train_step import init_train_state, make_train_step

LENGTH, ROWS = 256, 8


class Sizes(NamedTuple):
    """How much is measured."""

    steps: int
    seeds: int
    rates: tuple[float, ...]
    eval_tokens: int
    """Of the held-out text that are scored; 0 is all."""


QUICK = Sizes(150, 1, (1.6e-2,), 65_536)
FULL = Sizes(1400, 3, (4e-3, 8e-3, 1.6e-2, 3.2e-2), 0)


class Trained(NamedTuple):
    """A model and what the held-out text costs it."""

    config: Config
    params: nnx.State
    bits_per_byte: float
    seconds: float


def measure(sizes: Sizes) -> dict[str, Any]:
    """By side: parameters, learning rates tried, the best of them, and the loss of every seed."""
    results: dict[str, Any] = {"tokens": sizes.steps * LENGTH * ROWS}
    with tempfile.TemporaryDirectory() as folder:
        for side in SIDES:
            tried = {
                rate: train(side, folder, sizes, rate, seed=0).bits_per_byte for rate in sizes.rates
            }
            best = min(tried, key=lambda rate: tried[rate])
            losses = [tried[best]] + [
                train(side, folder, sizes, best, seed).bits_per_byte
                for seed in range(1, sizes.seeds)
            ]
            results[side] = {
                "parameters": count_parameters(config_of(side, LENGTH)),
                "rates": {str(rate): loss for rate, loss in tried.items()},
                "best_rate": best,
                "bits_per_byte": losses,
                "mean": statistics.mean(losses),
                "spread": max(losses) - min(losses),
            }
    return results


def train(side: str, folder: str, sizes: Sizes, rate: float, seed: int) -> Trained:
    """One run from random parameters; `folder` keeps the tokenized corpus.

    The held-out text is the same for all seeds.
    """
    start = time.perf_counter()
    config = config_of(side, LENGTH, ROWS)
    config, corpus = prepare(config, folder)
    config.train.seed, config.train.steps = seed, sizes.steps
    config.optimizer.learning_rate = rate
    # A cache as long as training's rows: what comes before would be at positions never seen.
    params = _take_steps(config, corpus)
    assert corpus.validation is not None
    evaluator = Evaluator(config, corpus.tokenizer.pad_id)
    result = evaluator(params, corpus.validation, sizes.eval_tokens)
    print(f"  {side}, rate {rate:g}, seed {seed}: {result.bits_per_byte:.4f} bits/byte", flush=True)
    return Trained(config, params, result.bits_per_byte, time.perf_counter() - start)


def _take_steps(config: Config, corpus: TokenizedCorpus) -> nnx.State:
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    step = make_train_step(config, optimizer)
    state = jax.jit(lambda: init_train_state(config, optimizer))()
    batches = make_batches(corpus.train, config.data, config.train.seed, corpus.tokenizer.pad_id)
    for _, batch in zip(range(config.train.steps), batches, strict=False):
        state, _ = step(state, batch)
    return state.params
