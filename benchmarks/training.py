"""Train steps: `pytorch_reference` and other implementations, `base` and `small` and matmuls.

`pytorch_reference` by four programs that learn from the same tokens: ours; ours by `scan`; a stack
of Flax's GRU cells of the same width; the same equations as an eager PyTorch loop over time.

`base` and `small` in float32 and bfloat16, as a share of the rate of a float32 matmul: a step
counts 6 operations per parameter and token (one matmul forward, two backward).
"""

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from simplernn_jax.config import PRECISIONS, Config, ModelConfig
from simplernn_jax.data.batches import Batch
from simplernn_jax.training.losses import cross_entropy

from . import measure, train_steps
from .measure import Call, Effort, alternate, block_ratio, median
from .tables import Row, Table
from .train_steps import count_parameters, load_config, our_step

BATCH, LENGTH = 16, 256
_SHARES = {"base": (BATCH, LENGTH), "small": (8, 512)}
"""Sequences and their tokens, by configuration."""


def run(effort: Effort) -> Iterator[Table]:
    """Tables of both comparisons."""
    reference = "pytorch_reference"
    title = f"train: {reference}, B {BATCH}, T {LENGTH}, float32"
    yield Table(title, compare_programs(load_config(reference, BATCH, LENGTH), effort))
    for name, (batch, length) in _SHARES.items():
        config = load_config(name, batch, length)
        title = f"train: {name}, {count_parameters(config):,} parameters, B {batch}, T {length}"
        title += "; 6 * parameters * tokens per step"
        yield Table(title, compare_precisions(config, effort))


def compare_programs(config: Config, effort: Effort) -> list[Row]:
    """Compare all programs that can train `config`, a plain model with one head."""
    has_torch = importlib.util.find_spec("torch") is not None
    calls = {"ours": our_step(config), "GRU": gru_step(config)}
    if has_torch:
        from .torch_loop import torch_step

        calls["PyTorch loop"] = torch_step(config)
    calls["scan"] = our_step(train_steps.with_method(config, "scan"))
    times = alternate(calls, effort)
    tokens = config.data.batch_size * config.data.sequence_length
    rows: list[Row] = []
    for name, blocks in times.items():
        row = {"program": name, "tokens/s": tokens / median(blocks)}
        rows.append(row | {"times slower than ours": block_ratio(blocks, times["ours"])})
    if not has_torch:
        rows.append({"program": "PyTorch loop: torch is not installed (pip install -e '.[bench]')"})
    return rows


def compare_precisions(config: Config, effort: Effort, size: int = 2048) -> list[Row]:
    """Compare our step in float32 and bfloat16 with a float32 matmul of ``size^3``."""
    calls: dict[str, Call] = {}
    for precision in PRECISIONS:
        config.model.precision = precision
        calls[precision] = our_step(config)
    calls["matmul"], of_matmul = measure.matmul((size, size), (size, size), "float32")
    times = alternate(calls, effort)
    tokens = config.data.batch_size * config.data.sequence_length
    flops = 6.0 * count_parameters(config) * tokens
    return [
        {
            "precision": name,
            "ms/step": 1e3 * median(times[name]),
            "tokens/s": tokens / median(times[name]),
            "over float32": block_ratio(times["float32"], times[name]),
            "GFLOP/s": flops / median(times[name]) / 1e9,
            f"float32 {size}^3 GFLOP/s": of_matmul / median(times["matmul"]) / 1e9,
            "share": flops / of_matmul / block_ratio(times[name], times["matmul"]),
        }
        for name in PRECISIONS
    ]


def gru_step(config: Config) -> Call:
    """A step of Adam on a `GRUStack` of the same sizes, with the same loss."""
    optimizer = optax.adam(config.optimizer.learning_rate)
    graph, params = nnx.split(GRUStack(config.model, nnx.Rngs(0)))

    def mean_loss(params: Any, batch: Batch) -> jax.Array:
        logits = nnx.merge(graph, params)(batch.tokens)
        return jnp.sum(cross_entropy(logits, batch.targets, batch.loss_mask)) / batch.targets.size

    state, step = (params, optimizer.init(params)), jitted_step(mean_loss, optimizer)
    return train_steps.repeated(step, state, train_steps.random_batch(config))


def jitted_step(mean_loss: Callable[[Any, Batch], jax.Array], optimizer: Any) -> Any:
    """A step of parameters and optimizer state, which it donates: the next ones, and the loss."""

    def step(state: Any, batch: Batch) -> Any:
        loss, gradient = jax.value_and_grad(mean_loss)(state[0], batch)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
            updates, opt_state = optimizer.update(gradient, state[1], state[0])
        return (optax.apply_updates(state[0], updates), opt_state), loss

    return jax.jit(step, donate_argnums=0)


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
