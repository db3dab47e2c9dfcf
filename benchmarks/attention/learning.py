"""Small models that learn a synthetic task, and how often they are then right."""

import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from simplernn_jax.config import Config, ModelConfig
from simplernn_jax.data.batches import Batch
from simplernn_jax.data.tasks import Task
from simplernn_jax.training.gradient import abstract_model
from simplernn_jax.training.optimizer import make_optimizer
from simplernn_jax.training.train_step import init_train_state, make_train_step

_TRAINING, _TESTING = 0, 1
"""Seeds of the rows: what is tested was never learned."""

TEST_TOKENS = 16_384
"""Of one call, so that long rows are tested in no more memory than short ones."""


class Lesson(NamedTuple):
    """A part of a training: the next begins with what this one ends with."""

    task: Task
    steps: int
    rows: int
    """Of one step."""


class Learned(NamedTuple):
    """A model after its training."""

    config: Config
    params: nnx.State
    loss: float
    """Nats per answer, mean over the last tenth of the steps."""
    seconds: float
    """Of the training, compilation included."""


def task_config(
    model: ModelConfig, lessons: Sequence[Lesson], optimizer: str, rate: float, seed: int = 0
) -> Config:
    """A run of `model`: one schedule of the learning rate, `rate` at most, over all lessons."""
    config = Config(model=model)
    config.model.vocab_size = lessons[0].task.vocab_size
    config.data.mode = "window"
    config.train.seed = seed
    config.train.steps = sum(lesson.steps for lesson in lessons)
    config.optimizer.name, config.optimizer.learning_rate = optimizer, rate
    config.optimizer.warmup_steps = max(config.train.steps // 20, 1)
    return config


def learn(config: Config, lessons: Sequence[Lesson]) -> Learned:
    """Takes the steps of all lessons, each on rows of its own."""
    start = time.perf_counter()
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    step = make_train_step(config, optimizer)
    state = jax.jit(lambda: init_train_state(config, optimizer))()
    losses: list[jax.Array] = []
    for lesson in lessons:
        for _ in range(lesson.steps):
            batch = lesson.task.batch(lesson.rows, _TRAINING, len(losses))
            state, metrics = step(state, batch)
            losses.append(metrics.loss)
    last = np.asarray(jax.device_get(losses[-max(len(losses) // 10, 1) :]))
    return Learned(config, state.params, float(last.mean()), time.perf_counter() - start)


def accuracies(learned: Learned, tasks: Mapping[int, Task], rows: int) -> dict[int, float]:
    """Of each task: share of answers that are the model's likeliest token, over `rows` rows or
    some more."""
    graph, _ = abstract_model(learned.config)

    @jax.jit
    def count(params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        logits, _ = nnx.merge(graph, params)(batch.tokens)
        right = (jnp.argmax(logits, axis=-1) == batch.targets) & batch.loss_mask
        return jnp.sum(right), jnp.sum(batch.loss_mask)

    found = {}
    for number, task in tasks.items():
        at_a_time = max(min(TEST_TOKENS // task.length, rows), 1)
        counts = [
            jax.device_get(count(learned.params, task.batch(at_a_time, _TESTING, index)))
            for index in range(-(-rows // at_a_time))
        ]
        right, asked = np.sum(counts, axis=0)
        found[number] = float(right / asked)
    return found
