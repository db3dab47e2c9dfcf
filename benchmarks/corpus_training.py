"""A short training on the default corpus: its memory, speed and held-out loss."""

import dataclasses
import itertools
import statistics
import time
from typing import Any, NamedTuple

import jax
from flax import nnx

from benchmarks.train_steps import megabytes
from simplernn_jax.config import Config
from simplernn_jax.data.batches import make_batches
from simplernn_jax.data.token_store import TokenizedCorpus
from simplernn_jax.models import LanguageModel
from simplernn_jax.models.simple_rnn import Recurrence
from simplernn_jax.ops import gated_linear_recurrence
from simplernn_jax.sharding.mesh import check_fits, make_mesh
from simplernn_jax.training import train_step
from simplernn_jax.training.evaluate import Evaluator
from simplernn_jax.training.gradient import abstract_model
from simplernn_jax.training.optimizer import make_optimizer
from simplernn_jax.training.preparation import prepare

TIMED_STEPS = 20


class Trained(NamedTuple):
    """Result of `train_on_corpus`."""

    config: Config
    params: nnx.State
    corpus: TokenizedCorpus
    measured: dict[str, float]
    """``memory MB``, 1e6 bytes of working memory of a step on one device by XLA's memory analysis;
    ``tokens/s``, by the median time of `TIMED_STEPS` steps, without the first step; held-out loss
    in ``nats/token`` and ``bits/byte``."""

    def model(self) -> LanguageModel:
        """The trained model."""
        return nnx.merge(abstract_model(self.config)[0], self.params)


def train_on_corpus(
    config: Config,
    workdir: str,
    *,
    recurrence: Recurrence = gated_linear_recurrence,
    seed: int = 0,
) -> Trained:
    """Take all steps of `config`, then evaluate on ``train.eval_tokens`` held-out tokens.

    `workdir` keeps the tokenized corpus. `seed` is of parameters and batches; the split of the
    corpus follows from ``train.seed``.
    """
    config, corpus = prepare(config, workdir)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=seed))
    mesh = make_mesh(config.mesh)
    check_fits(config, mesh)
    optimizer = make_optimizer(config.optimizer, config.train.steps, mesh)
    pad_id = corpus.tokenizer.pad_id
    batches = make_batches(corpus.train, config.data, seed, pad_id)
    shardings = train_step.state_shardings(config, optimizer, mesh)
    init = jax.jit(lambda: train_step.init_train_state(config, optimizer), out_shardings=shardings)
    state, first = init(), next(batches)
    jitted: Any = train_step.make_train_step(config, optimizer, mesh, recurrence)
    step = jitted.lower(state, first).compile()
    state, _ = jax.block_until_ready(step(state, first))
    seconds = []
    for done in range(1, config.train.steps, TIMED_STEPS):
        steps = min(TIMED_STEPS, config.train.steps - done)
        started = time.perf_counter()
        taken = train_step.take_steps(step, state, itertools.islice(batches, steps))
        state, _ = jax.block_until_ready(taken)
        seconds.append((time.perf_counter() - started) / steps)
    held_out: Any = corpus.validation  # by default there is one
    evaluation = Evaluator(config, pad_id, mesh)(state.params, held_out, config.train.eval_tokens)
    tokens = config.data.batch_size * config.data.sequence_length
    measured = {
        "memory MB": megabytes(step),
        "tokens/s": tokens / statistics.median(seconds),
        "nats/token": evaluation.nats_per_token,
        "bits/byte": evaluation.bits_per_byte,
    }
    return Trained(config, state.params, corpus, measured)


def measure_on_corpus(config: Config, workdir: str) -> dict[str, float]:
    """Measurements of `train_on_corpus`; for `on_simulated_devices`."""
    return train_on_corpus(config, workdir).measured
