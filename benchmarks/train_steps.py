"""Compiled train steps on random tokens: ours, with another recurrence, and a stack of GRUs."""

import functools
import math
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
from simplernn_jax.models import LanguageModel
from simplernn_jax.models.simple_rnn import Recurrence
from simplernn_jax.ops import gated_linear_recurrence
from simplernn_jax.ops.chunkwise import choose_chunk_size
from simplernn_jax.sharding.mesh import make_mesh
from simplernn_jax.training.gradient import abstract_model
from simplernn_jax.training.losses import summed_cross_entropy
from simplernn_jax.training.optimizer import make_optimizer
from simplernn_jax.training.train_step import init_train_state, make_train_step

_CONFIGS = Path(__file__).resolve().parents[1] / "configs"
_STEPS = 1000
"""Length of the learning rate schedule; further steps stay at its end."""
_QUICK_COMPILATION: Any = {"xla_backend_optimization_level": 0}
"""Buffers and collectives are settled before the backend generates code."""

BY_SCAN: Recurrence = functools.partial(gated_linear_recurrence, method="scan")


def by_chunks(length: int) -> Recurrence:
    """The chunkwise recurrence, on every machine, with the default chunks of `length` tokens."""
    return functools.partial(gated_linear_recurrence, chunk_size=choose_chunk_size(length))


def load_config(name: str, batch: int, length: int, **model: Any) -> Config:
    """``configs/NAME.py`` on one device, with random windows and these fields of its model."""
    config = config_flag.load_config(_CONFIGS / f"{name}.py")
    config.data.mode = "window"
    config.data.batch_size, config.data.sequence_length = batch, length
    config.mesh.data = 1
    for field, value in model.items():
        setattr(config.model, field, value)
    return config


def random_batch(config: Config) -> Batch:
    """Random tokens, one document per sequence, every prediction counted."""
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


def count_parameters(config: Config) -> int:
    """Number of parameters of the model; an embedding that is also the head counts once."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_model(config)[1]))


def state_bytes(model: ModelConfig) -> int:
    """Bytes of the decoder state of one sequence."""

    def make() -> Any:
        return LanguageModel(model, rngs=nnx.Rngs(0)).initial_state(1)

    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(nnx.eval_shape(make)))


def compile_quickly(config: Config, recurrence: Recurrence = gated_linear_recurrence) -> Any:
    """Our train step on the mesh of `config`, compiled to be analyzed and not to be run."""
    mesh = make_mesh(config.mesh)
    optimizer = make_optimizer(config.optimizer, _STEPS, mesh)
    state = jax.eval_shape(lambda: init_train_state(config, optimizer))
    step: Any = make_train_step(config, optimizer, mesh, recurrence)
    return step.lower(state, random_batch(config)).compile(_QUICK_COMPILATION)


def temporary_bytes(program: Any) -> float:
    """Working memory of a compiled program on one device, by XLA's memory analysis."""
    return float(program.memory_analysis().temp_size_in_bytes)


class CompiledStep:
    """A train step as one compiled program; each call continues from the last one's state.

    Args:
      step: jitted, ``(state, batch) -> (state, metrics)``.
      make_state: returns the initial state.
      batch: of every step.
    """

    def __init__(self, step: Any, make_state: Callable[[], Any], batch: Batch):
        self.batch = jax.device_put(batch)
        self._make_state = jax.jit(make_state)
        self._state: Any = None
        shapes = jax.eval_shape(make_state)
        self.program = step.lower(shapes, self.batch).compile()

    @property
    def compiled_bytes(self) -> float:
        """Working memory and arguments; the results reuse the donated state's memory."""
        memory = self.program.memory_analysis()
        return float(memory.temp_size_in_bytes + memory.argument_size_in_bytes)

    def prepare(self) -> None:
        """Make the initial state, so that the next call takes a step and nothing else."""
        self._state = jax.block_until_ready(self._make_state())

    def __call__(self) -> Any:
        """Take one step; return its metrics, not waited for."""
        if self._state is None:
            self.prepare()
        self._state, metrics = self.program(self._state, self.batch)
        return metrics


def our_step(config: Config, recurrence: Recurrence = gated_linear_recurrence) -> CompiledStep:
    """The step of `simplernn_jax.training`, as training runs it on one device."""
    optimizer = make_optimizer(config.optimizer, _STEPS)
    return CompiledStep(
        make_train_step(config, optimizer, recurrence=recurrence),
        lambda: init_train_state(config, optimizer),
        random_batch(config),
    )


def scan_step(config: Config) -> CompiledStep:
    """The same step with ``method="scan"``."""
    return our_step(config, BY_SCAN)


def gru_step(config: Config) -> CompiledStep:
    """A step of Adam on a `GRUStack` of the same sizes, with the same loss."""
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
    """A plain stack of Flax's GRU cells, in the place of SimpleRNN."""

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
