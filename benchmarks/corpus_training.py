"""A short training on the default corpus: its memory, speed and held-out loss."""

import dataclasses
import itertools
import statistics
import time
from typing import Any, NamedTuple

import jax
from flax import nnx

from benchmarks.train_steps import temporary_bytes
from simplernn_jax import config as config_lib
from simplernn_jax.config import Config
from simplernn_jax.data.batches import make_batches
from simplernn_jax.data.token_store import TokenizedCorpus
from simplernn_jax.models import LanguageModel
from simplernn_jax.models.simple_rnn import Recurrence
from simplernn_jax.ops import gated_linear_recurrence
from simplernn_jax.sharding.global_arrays import global_arrays_from_local
from simplernn_jax.sharding.mesh import check_fits, make_mesh
from simplernn_jax.training.evaluate import Evaluator
from simplernn_jax.training.gradient import abstract_model
from simplernn_jax.training.optimizer import make_optimizer
from simplernn_jax.training.placement import batch_shardings
from simplernn_jax.training.preparation import prepare
from simplernn_jax.training.train_step import (
    init_train_state,
    make_train_step,
    state_shardings,
    take_steps,
)

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

    Args:
      config: of the run; its mesh uses the devices of this process.
      workdir: keeps the tokenized corpus.
      recurrence: of the model.
      seed: of parameters and batches; the split of the corpus follows from ``train.seed``.
    """
    config, corpus = prepare(config, workdir)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=seed))
    mesh = make_mesh(config.mesh)
    check_fits(config, mesh)
    optimizer = make_optimizer(config.optimizer, config.train.steps, mesh)
    shardings, pad_id = batch_shardings(mesh), corpus.tokenizer.pad_id
    batches = (
        jax.device_put(batch)
        if shardings is None
        else global_arrays_from_local(batch, shardings, 0, config.data.batch_size)
        for batch in make_batches(corpus.train, config.data, seed, pad_id)
    )
    init = jax.jit(
        lambda: init_train_state(config, optimizer),
        out_shardings=state_shardings(config, optimizer, mesh),
    )
    state, first = init(), next(batches)
    jitted: Any = make_train_step(config, optimizer, mesh, recurrence)
    step = jitted.lower(state, first).compile()
    state, _ = jax.block_until_ready(step(state, first))
    seconds = []
    for done in range(1, config.train.steps, TIMED_STEPS):
        steps = min(TIMED_STEPS, config.train.steps - done)
        started = time.perf_counter()
        state, _ = jax.block_until_ready(take_steps(step, state, itertools.islice(batches, steps)))
        seconds.append((time.perf_counter() - started) / steps)
    held_out: Any = corpus.validation  # by default there is one
    evaluation = Evaluator(config, pad_id, mesh)(state.params, held_out, config.train.eval_tokens)
    tokens = config.data.batch_size * config.data.sequence_length
    measured = {
        "memory MB": temporary_bytes(step) / 1e6,
        "tokens/s": tokens / statistics.median(seconds),
        "nats/token": evaluation.nats_per_token,
        "bits/byte": evaluation.bits_per_byte,
    }
    return Trained(config, state.params, corpus, measured)


def measure_on_corpus(config: str, workdir: str) -> dict[str, float]:
    """Measurements of `train_on_corpus`; for `call_isolated`, with a configuration as JSON."""
    return train_on_corpus(config_lib.from_json(config), workdir).measured
