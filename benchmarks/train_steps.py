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

from benchmarks.measure import Call
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

_STEPS = 1000
"""Length of the learning rate schedule; further steps stay at its end."""

BY_SCAN: Recurrence = functools.partial(gated_linear_recurrence, method="scan")


def by_chunks(length: int) -> Recurrence:
    """The chunkwise recurrence, on every machine, with the default chunks of `length` tokens."""
    return functools.partial(gated_linear_recurrence, chunk_size=choose_chunk_size(length))


def change(config: Config, **fields: Any) -> Config:
    """Set these fields, of any section, by name; return `config`."""
    for name, value in fields.items():
        section = next(part for part in vars(config).values() if hasattr(part, name))
        setattr(section, name, value)
    return config


def load_config(name: str, batch: int, length: int, **fields: Any) -> Config:
    """``configs/NAME.py`` on one device, with random windows and these fields of any section."""
    config = config_flag.load_config(Path(__file__).parents[1] / "configs" / f"{name}.py")
    config.mesh.data = 1
    return change(config, mode="window", batch_size=batch, sequence_length=length, **fields)


def random_batch(config: Config) -> Batch:
    """Random tokens, one document per sequence, every prediction counted."""
    shape = (config.data.batch_size, config.data.sequence_length)
    draw = np.random.default_rng(0)
    tokens = draw.integers(0, config.model.vocab_size, (shape[0], shape[1] + 1), np.int32)
    ids, reset = np.zeros(shape, np.int32), np.ones(shape[0], bool)
    return Batch(tokens[:, :-1], tokens[:, 1:], np.ones(shape, bool), ids, reset)


def count_parameters(config: Config) -> int:
    """Number of parameters of the model; an embedding that is also the head counts once."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_model(config)[1]))


def abstract_state(model: ModelConfig) -> Any:
    """Shapes of the decoder state of one sequence."""
    return nnx.eval_shape(lambda: LanguageModel(model, rngs=nnx.Rngs(0)).initial_state(1))


def state_bytes(model: ModelConfig) -> int:
    """Bytes of the decoder state of one sequence."""
    leaves = jax.tree.leaves(abstract_state(model))
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)


def compile_quickly(config: Config, recurrence: Recurrence = gated_linear_recurrence) -> Any:
    """Our train step on the mesh of `config`, compiled to be analyzed and not to be run."""
    mesh = make_mesh(config.mesh)
    optimizer = make_optimizer(config.optimizer, _STEPS, mesh)
    state = jax.eval_shape(lambda: init_train_state(config, optimizer))
    step: Any = make_train_step(config, optimizer, mesh, recurrence)
    # Buffers and collectives are settled before the backend generates code.
    return step.lower(state, random_batch(config)).compile({"xla_backend_optimization_level": 0})


def megabytes(program: Any) -> float:
    """Working memory of a compiled program on one device, by XLA's analysis, in 1e6 bytes."""
    return float(program.memory_analysis().temp_size_in_bytes) / 1e6


def compiled_step(step: Any, make_state: Callable[[], Any], batch: Batch) -> Call:
    """Compile ``(state, batch) -> (state, metrics)``, jitted; each call continues from the last."""
    batch = jax.device_put(batch)
    program = step.lower(jax.eval_shape(make_state), batch).compile()
    state = jax.block_until_ready(jax.jit(make_state)())

    def call() -> Any:
        nonlocal state
        state, metrics = program(state, batch)
        return metrics

    return call


def our_step(config: Config, recurrence: Recurrence = gated_linear_recurrence) -> Call:
    """The step of `simplernn_jax.training`, as training runs it on one device."""
    optimizer = make_optimizer(config.optimizer, _STEPS)
    step = make_train_step(config, optimizer, recurrence=recurrence)
    return compiled_step(step, lambda: init_train_state(config, optimizer), random_batch(config))


def gru_step(config: Config) -> Call:
    """A step of Adam on a `GRUStack` of the same sizes, with the same loss."""
    optimizer = optax.adam(config.optimizer.learning_rate)
    graph = nnx.graphdef(nnx.eval_shape(lambda: GRUStack(config.model, nnx.Rngs(0))))

    def start() -> Any:
        params = nnx.state(GRUStack(config.model, nnx.Rngs(0)))
        return params, optimizer.init(params)

    def mean_loss(params: Any, batch: Batch) -> jax.Array:
        logits = nnx.merge(graph, params)(batch.tokens)
        return summed_cross_entropy(logits, batch.targets, batch.loss_mask) / batch.targets.size

    def step(state: Any, batch: Batch) -> Any:
        loss, gradient = jax.value_and_grad(mean_loss)(state[0], batch)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
            updates, opt_state = optimizer.update(gradient, state[1], state[0])
        return (optax.apply_updates(state[0], updates), opt_state), loss

    return compiled_step(jax.jit(step, donate_argnums=0), start, random_batch(config))


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
        for layer in self.layers:
            x = layer(x, initial_carry=jnp.zeros((len(x), x.shape[-1])))
        return self.head(x).astype(jnp.float32)
