"""A training of seconds on the default corpus: what it needs, how fast it is, what it learns."""

import dataclasses
import statistics
import time
from typing import Any, NamedTuple

import jax
from flax import nnx

from simplernn_jax import config as config_lib
from simplernn_jax.config import Config
from simplernn_jax.data.batches import make_batches
from simplernn_jax.data.token_store import TokenizedCorpus
from simplernn_jax.models.simple_rnn import Recurrence
from simplernn_jax.ops import gated_linear_recurrence
from simplernn_jax.sharding.global_arrays import global_arrays_from_local
from simplernn_jax.sharding.mesh import check_fits, make_mesh
from simplernn_jax.training.evaluate import Evaluator
from simplernn_jax.training.optimizer import make_optimizer
from simplernn_jax.training.placement import batch_shardings
from simplernn_jax.training.preparation import prepare
from simplernn_jax.training.train_step import init_train_state, make_train_step, state_shardings

TIMED_STEPS = 20


class Trained(NamedTuple):
    """What a training leaves behind."""

    params: nnx.State
    corpus: TokenizedCorpus
    measured: dict[str, float]
    """``memory_mb``, 1e6 bytes that a step works in on one device, by the compiler's account;
    ``tokens_per_s``, by the median time of `TIMED_STEPS` steps, the first one left out; ``loss``,
    nats per token of held-out text."""


def train_short(
    config: Config,
    workdir: str,
    *,
    recurrence: Recurrence = gated_linear_recurrence,
    draw: int = 0,
) -> Trained:
    """All steps of `config`, one after another, then an evaluation of ``train.eval_tokens``.

    Args:
      config: of the run; its mesh takes what devices there are.
      workdir: where the tokenized corpus is kept.
      recurrence: of the model.
      draw: which parameters and batches; the text that is held out stays.
    """
    config, corpus = prepare(config, workdir)
    seed = config.train.seed + draw
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=seed))
    mesh = make_mesh(config.mesh)
    check_fits(config, mesh)
    optimizer = make_optimizer(config.optimizer, config.train.steps, mesh)
    placed = batch_shardings(mesh)
    pad_id = corpus.tokenizer.pad_id
    batches = make_batches(corpus.train, config.data, config.train.seed, pad_id)

    def next_batch() -> Any:
        batch = next(batches)
        if placed is None:
            return jax.device_put(batch)
        return global_arrays_from_local(batch, placed, 0, config.data.batch_size)

    init = jax.jit(
        lambda: init_train_state(config, optimizer),
        out_shardings=state_shardings(config, optimizer, mesh),
    )
    state = init()
    jitted: Any = make_train_step(config, optimizer, mesh, recurrence)
    step = jitted.lower(state, next_batch()).compile()
    state, _ = step(state, next_batch())
    jax.block_until_ready(state)
    seconds = []
    for first in range(1, config.train.steps, TIMED_STEPS):
        steps = min(TIMED_STEPS, config.train.steps - first)
        started = time.perf_counter()
        for _ in range(steps):
            state, _ = step(state, next_batch())
        jax.block_until_ready(state)
        seconds.append((time.perf_counter() - started) / steps)
    held_out: Any = corpus.validation  # by default there is one
    evaluation = Evaluator(config, pad_id, mesh)(state.params, held_out, config.train.eval_tokens)
    tokens = config.data.batch_size * config.data.sequence_length
    measured = {
        "memory_mb": step.memory_analysis().temp_size_in_bytes / 1e6,
        "tokens_per_s": tokens / statistics.median(seconds),
        "loss": evaluation.nats_per_token,
    }
    return Trained(state.params, corpus, measured)


def measure_short(config: str, workdir: str) -> dict[str, float]:
    """What `train_short` measures; for `call_isolated`, with a configuration as JSON."""
    return train_short(config_lib.from_json(config), workdir).measured
