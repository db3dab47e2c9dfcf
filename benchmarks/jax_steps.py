"""Train steps in JAX, compiled, on random tokens: ours, per token, and a stack of GRUs."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from simplernn_jax import config_flag
from simplernn_jax.config import Config, ModelConfig
from simplernn_jax.data.batches import Batch
from simplernn_jax.models.simple_rnn import Recurrence
from simplernn_jax.ops import gated_linear_recurrence
from simplernn_jax.training.losses import summed_cross_entropy
from simplernn_jax.training.optimizer import make_optimizer
from simplernn_jax.training.train_step import init_train_state, make_train_step

_CONFIGS = Path(__file__).resolve().parents[1] / "configs"
BY_SCAN: Recurrence = functools.partial(gated_linear_recurrence, method="scan")
_STEPS = 1000
"""Length of the learning rate's schedule; more steps only go on at its end."""


def load_config(name: str, batch: int, length: int, **model: Any) -> Config:
    """``configs/NAME.py`` with random windows of this size and these fields of its model."""
    config = config_flag.load_config(_CONFIGS / f"{name}.py")
    config.data.mode = "window"
    config.data.batch_size, config.data.sequence_length = batch, length
    for field, value in model.items():
        setattr(config.model, field, value)
    return config


def random_batch(config: Config) -> Batch:
    """Random tokens as one document per row, every prediction counted."""
    shape = (config.data.batch_size, config.data.sequence_length)
    draw = np.random.default_rng(0)
    tokens = draw.integers(0, config.model.vocab_size, (shape[0], shape[1] + 1), np.int32)
    return Batch(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        loss_mask=np.ones(shape, bool),
        segment_ids=np.zeros(shape, np.int32),
        reset=np.ones(shape[0], bool),
    )


class CompiledStep:
    """A train step as one compiled program; each call takes one step from where the last ended.

    Args:
      step: jitted, ``(state, batch) -> (state, metrics)``.
      make_state: gives the state to start from.
      batch: of every step.
    """

    def __init__(self, step: Any, make_state: Callable[[], Any], batch: Batch):
        self.batch = jax.device_put(batch)
        self._make_state = jax.jit(make_state)
        self._state: Any = None
        shapes = jax.eval_shape(make_state)
        self.program = step.lower(shapes, self.batch).compile()

    @property
    def temporary_bytes(self) -> float:
        """Working memory of the program, by the compiler's account."""
        return float(self.program.memory_analysis().temp_size_in_bytes)

    @property
    def compiled_bytes(self) -> float:
        """Working memory and arguments; the results take the place of the donated state."""
        return self.temporary_bytes + self.program.memory_analysis().argument_size_in_bytes

    def prepare(self) -> None:
        """Makes the state, so that the next call is a step and nothing else."""
        self._state = jax.block_until_ready(self._make_state())

    def __call__(self) -> Any:
        """Takes one step; what it returns besides the state, not waited for."""
        if self._state is None:
            self.prepare()
        self._state, metrics = self.program(self._state, self.batch)
        return metrics


def our_step(config: Config, recurrence: Recurrence = gated_linear_recurrence) -> CompiledStep:
    """The step of `simplernn_jax.training`, as training runs it."""
    optimizer = make_optimizer(config.optimizer, _STEPS)
    return CompiledStep(
        make_train_step(config, optimizer, recurrence=recurrence),
        lambda: init_train_state(config, optimizer),
        random_batch(config),
    )


def scan_step(config: Config) -> CompiledStep:
    """The same step and model, the recurrence by ``method="scan"``."""
    return our_step(config, BY_SCAN)


def gru_step(config: Config) -> CompiledStep:
    """Adam on a `GRUStack` of the same sizes, with the same loss."""
    graph, _ = nnx.split(nnx.eval_shape(lambda: GRUStack(config.model, nnx.Rngs(0))))
    optimizer = optax.adam(config.optimizer.learning_rate)

    def start() -> tuple[Any, Any]:
        params = nnx.state(GRUStack(config.model, nnx.Rngs(0)))
        return params, optimizer.init(params)

    def step(state: tuple[Any, Any], batch: Batch) -> tuple[Any, jax.Array]:
        params, opt_state = state

        def mean_loss(params: Any) -> jax.Array:
            logits = nnx.merge(graph, params)(batch.tokens)
            nats = summed_cross_entropy(logits, batch.targets, batch.loss_mask)
            return nats / batch.targets.size

        loss, gradient = jax.value_and_grad(mean_loss)(params)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    return CompiledStep(jax.jit(step, donate_argnums=0), start, random_batch(config))


class GRUStack(nnx.Module):
    """Flax's own GRU in the place of SimpleRNN, in a plain stack of the same width."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        width = config.hidden_dim
        self.embedding = nnx.Embed(config.vocab_size, width, rngs=rngs)
        cells = [nnx.GRUCell(width, width, rngs=rngs) for _ in range(config.num_layers)]
        self.layers = nnx.List([nnx.RNN(cell, rngs=False) for cell in cells])
        self.head = nnx.Linear(width, config.vocab_size, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """``[B, T]`` token ids to ``[B, T, vocab]`` logits."""
        x = self.embedding(tokens)
        start = jnp.zeros((len(x), x.shape[-1]))
        for layer in self.layers:
            x = layer(x, initial_carry=start)
        return self.head(x).astype(jnp.float32)
