"""Programs that train on the text of a configuration: ours, and the settings of its baselines.

Their held-out loss is measured against the seconds of their steps.
"""

import abc
import dataclasses
import functools
import importlib.util
import math
import time
from typing import Any, NamedTuple

import jax

from simplernn_jax.config import Config, DataConfig, OptimizerConfig
from simplernn_jax.data.batches import make_batches
from simplernn_jax.data.token_store import TokenizedCorpus
from simplernn_jax.errors import UserError
from simplernn_jax.ops.native import has_fast_bfloat16
from simplernn_jax.training.evaluate import Evaluator
from simplernn_jax.training.minutes import regularization
from simplernn_jax.training.optimizer import make_optimizer
from simplernn_jax.training.preparation import prepare
from simplernn_jax.training.train_step import init_train_state, make_train_step

from ..tables import Row
from ..train_steps import count_parameters

OURS = "ours"
NANOGPT = "gpt_cpu"
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
    weight_decay: float = 0.1
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
    """Ours and the baselines of a configuration; nanoGPT's settings are for characters.

    Its settings for GPUs, of which a CPU core takes 18 steps in ten minutes, and compiled programs
    run only if named.
    """
    return OURS, NANOGPT if tokenizer == "char" else "gpt_matched", "lstm", "gru"


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

    @abc.abstractmethod
    def evaluate(self, limit_tokens: int = 0) -> float:
        """Nats per token of held-out text, each token scored once; 0 scores all of it.

        The state is carried over each document.
        """


class OurTrainer(Trainer):
    """Training of a configuration, as `simplernn_jax.training` runs it on one device."""

    def __init__(self, config: Config, corpus: TokenizedCorpus, steps: int, seed: int) -> None:
        super().__init__(corpus, config.data, seed)
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=seed))
        schedule = config.optimizer
        if steps < config.train.steps:
            warmup = min(schedule.warmup_steps, steps // 10)  # the share in shakespeare
            schedule = dataclasses.replace(schedule, warmup_steps=warmup)
        optimizer = make_optimizer(schedule, steps)
        self.parameters = count_parameters(config)
        self._state = jax.jit(lambda: init_train_state(config, optimizer))()
        self._step = make_train_step(config, optimizer)
        self._evaluator = Evaluator(config, self._pad_id)

    def take(self, steps: int) -> None:
        """See `Trainer.take`."""
        for _ in range(steps):
            self._state, _ = self._step(self._state, next(self._batches))
        jax.block_until_ready(self._state)

    def evaluate(self, limit_tokens: int = 0) -> float:
        """See `Trainer.evaluate`."""
        scored = self._evaluator(self._state.params, self._held_out, limit_tokens)
        return scored.nats_per_token


CALIBRATION = 0.1
"""Part of the seconds in which steps are timed beforehand."""


def train_timed(
    config: Config, workdir: str, name: str, limit: float, rate: float | None, seed: int
) -> Row:
    """Train `name`, one of `LABELS`, on the text of `config`; for `call_isolated`.

    With `limit` above 0, seconds of all steps, their number is estimated from some timed
    beforehand, and ours has the `regularization` and precision of ``--size=auto``. `rate` replaces
    the peak learning rate of a baseline's settings.

    Returns:
      Its sizes; ``seconds`` of steps, without the first, which compiles; ``loss`` of the held-out
      text, in nats/char for a text of characters, else in bits/byte.
    """
    config, corpus, _ = prepare(config, workdir)
    held_out: Any = corpus.validation
    baseline = None if name == OURS else find_baseline(name, config, rate)
    steps = config.train.steps if baseline is None else baseline.steps
    if limit:
        if has_fast_bfloat16():
            config.model.precision = "bfloat16"
        timed = functools.partial(_steps_in, limit, name, config, corpus, rate, seed)
        steps = timed(steps)
        if baseline is None:
            tokens = steps * config.data.batch_size * config.data.sequence_length
            config.model.dropout, config.optimizer.weight_decay = regularization(
                tokens / len(corpus.train.tokens), config.model.hidden_dim
            )
            steps = timed(steps)  # dropout takes time
    trainer = make_trainer(name, config, corpus, steps, rate, seed)
    trainer.take(1)
    started = time.perf_counter()
    trainer.take(steps - 1)
    seconds = time.perf_counter() - started
    unit = 1.0
    if config.data.tokenizer != "char":
        unit = held_out.num_predictions / held_out.num_bytes / math.log(2)
    return {
        **{"program": name, "limit": limit, "seed": seed, "rate": baseline and baseline.rate},
        **{"parameters": trainer.parameters, "steps": steps, "seconds": seconds},
        "loss": unit * trainer.evaluate(),
    }


def make_trainer(
    name: str, config: Config, corpus: TokenizedCorpus, steps: int, rate: float | None, seed: int
) -> Trainer:
    """A model before its first step, whose learning rate ends after `steps`.

    Raises:
      UserError: PyTorch is missing.
    """
    if name == OURS:
        return OurTrainer(config, corpus, steps, seed)
    if importlib.util.find_spec("torch") is None:
        raise UserError(f"{name}: torch is not installed; run: pip install -e '.[bench]'")
    from .torch_trainers import TorchTrainer

    baseline = find_baseline(name, config, rate)
    return TorchTrainer(baseline, corpus, config.model.vocab_size, steps, seed)


def _steps_in(
    limit: float,
    name: str,
    config: Config,
    corpus: TokenizedCorpus,
    rate: float | None,
    seed: int,
    steps: int,
) -> int:
    """Number of steps in `limit` seconds, by the mean time of some after the first, slower ones."""
    trainer = make_trainer(name, config, corpus, steps, rate, seed)
    trainer.take(3)
    started, taken = time.perf_counter(), 0
    while taken < 2 or time.perf_counter() - started < CALIBRATION * limit:
        count = 2 if taken < 2 else 8  # in training, batches are made during steps
        trainer.take(count)
        taken += count
    return max(2, int(limit * taken / (time.perf_counter() - started)))
