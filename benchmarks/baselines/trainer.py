"""One training whose held-out loss is measured against the seconds of its steps."""

import abc
import importlib.util
import math
import time
from collections.abc import Iterable
from typing import Any

import numpy as np

from simplernn_jax.config import Config, DataConfig
from simplernn_jax.data.batches import Batch, make_batches
from simplernn_jax.data.evaluation_batches import evaluation_batches
from simplernn_jax.data.token_store import TokenizedCorpus
from simplernn_jax.errors import UserError
from simplernn_jax.training.evaluate import BATCH_TOKENS, MAX_BATCH_SIZE
from simplernn_jax.training.preparation import prepare

from ..tables import Row
from .programs import OURS, find_baseline

POINTS = 16
"""Evaluations of a training, denser at its beginning. While they have taken longer than training,
all but the last are left out: attention scores overlapping contexts."""
CURVE_TOKENS = 131_072
"""Held-out tokens of each, or all if there are fewer."""
CALIBRATION = 0.05
"""Part of the seconds in which steps are timed beforehand."""


class Trainer(abc.ABC):
    """A model of ours, or a baseline, and its training on random windows."""

    parameters: int

    def __init__(self, corpus: TokenizedCorpus, settings: DataConfig, seed: int) -> None:
        self._held_out: Any = corpus.validation
        self._pad_id = corpus.tokenizer.pad_id
        self._batches = make_batches(corpus.train, settings, seed, self._pad_id)

    @abc.abstractmethod
    def take(self, steps: int) -> None:
        """Take optimizer steps, and wait for them."""

    def score(self, batch: Batch, carry: Any) -> tuple[float, Any]:
        """Sum of the nats of a batch's predictions, and the carry; before the first it is None.

        For `evaluate`, unless that is overridden.
        """
        raise NotImplementedError

    def evaluate(self, limit_tokens: int = 0) -> float:
        """Nats per token of held-out text, each token scored once; 0 scores all of it.

        The state is carried over each document.
        """
        sizes = BATCH_TOKENS, MAX_BATCH_SIZE
        return self.mean_loss(
            evaluation_batches(self._held_out, *sizes, self._pad_id, limit_tokens)
        )

    def mean_loss(self, batches: Iterable[Batch]) -> float:
        """Nats per token of consecutive batches."""
        total, count, carry = 0.0, 0, None
        for batch in batches:
            nats, carry = self.score(batch, carry)
            total, count = total + nats, count + int(np.sum(batch.loss_mask))
        return total / count


def train_timed(
    config: Config, workdir: str, name: str, seconds: float, rate: float | None, seed: int
) -> Row:
    """Train `name`, one of `LABELS`, on the text of `config`; for `call_isolated`.

    With `seconds` above 0, the time of all steps, their number is estimated from some timed
    beforehand. `rate` replaces the peak learning rate of a baseline's settings.

    Returns:
      Its sizes; ``loss`` of the whole held-out text, in nats/char for a text of characters, else in
      bits/byte; and ``curve``, pairs of seconds of steps (without the first, which compiles, and
      without evaluations) and loss of a part, shifted so that the last equals the whole's.
    """
    config, corpus = prepare(config, workdir)
    held_out: Any = corpus.validation
    baseline = None if name == OURS else find_baseline(name, config, rate)
    steps = config.train.steps if baseline is None else baseline.steps
    if seconds:
        trial = make_trainer(name, config, corpus, steps, rate, seed)
        steps = max(2, int(seconds / seconds_per_step(trial, CALIBRATION * seconds)))
    trainer = make_trainer(name, config, corpus, steps, rate, seed)
    trainer.take(1)
    curve, trained, evaluating, taken = [], 0.0, 0.0, 1
    for point in range(1, POINTS + 1):
        until = max(2, round(steps * (point / POINTS) ** 1.5))
        if until == taken:
            continue
        started = time.perf_counter()
        trainer.take(until - taken)
        trained, taken = trained + time.perf_counter() - started, until
        if evaluating <= trained or point == POINTS:
            started = time.perf_counter()
            curve.append((trained, trainer.evaluate(CURVE_TOKENS)))
            evaluating += time.perf_counter() - started
    final, is_text = trainer.evaluate(), config.data.tokenizer != "char"
    unit = held_out.num_predictions / held_out.num_bytes / math.log(2) if is_text else 1.0
    shift = final - curve[-1][1]
    shift = shift if math.isfinite(shift) else 0.0
    return {
        **{"program": name, "seed": seed, "rate": baseline and baseline.rate},
        **{"parameters": trainer.parameters, "steps": taken, "seconds": trained},
        "loss": unit * final,
        "curve": [(seconds, unit * (loss + shift)) for seconds, loss in curve],
    }


def make_trainer(
    name: str, config: Config, corpus: TokenizedCorpus, steps: int, rate: float | None, seed: int
) -> Trainer:
    """A model before its first step, whose learning rate ends after `steps`.

    Raises:
      UserError: PyTorch is missing.
    """
    if name == OURS:
        from .jax_trainers import OurTrainer

        return OurTrainer(config, corpus, steps, seed)
    baseline = find_baseline(name, config, rate)
    settings = baseline, corpus, config.model.vocab_size, steps, seed
    if baseline.model == "gru":
        from .jax_trainers import GRUTrainer

        return GRUTrainer(*settings)
    if importlib.util.find_spec("torch") is None:
        raise UserError(f"{name}: torch is not installed; run: pip install -e '.[bench]'")
    from .torch_trainers import TorchTrainer

    return TorchTrainer(*settings)


def seconds_per_step(trainer: Trainer, seconds: float) -> float:
    """Mean time of the steps that begin within `seconds`, and at least of two, after the first."""
    trainer.take(1)
    started, taken = time.perf_counter(), 0
    while taken < 2 or time.perf_counter() - started < seconds:
        count = 2 if taken < 2 else 8  # in training, batches are made during steps
        trainer.take(count)
        taken += count
    return (time.perf_counter() - started) / taken
