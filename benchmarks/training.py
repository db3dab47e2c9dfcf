"""Speed of training: the recurrence alone, whole train steps, and the first one.

`run_ops`: the recurrence, forward and backward, compared with its other forms and batched matmuls.
``ours`` is the form that `gated_linear_recurrence` chooses. The necessary products are ``6 K V``
multiply-adds per token and head: the definition has two products of a K x V matrix with a vector
per token (k v^T, S^T q), and its gradient four (dy S^T, q dy^T, v dS^T, k dS).

`run_steps`: `pytorch_reference` by four programs that learn from the same tokens: ours; ours by
`scan`; a stack of Flax's GRU cells of the same width; the same equations as an eager PyTorch loop
over time. `base` and `small` in float32 and bfloat16, as a share of the rate of a float32 matmul: a
step counts 6 operations per parameter and token (one matmul forward, two backward).

`run_startup`: the first train step of `base`, in fresh processes. The compilation cache is the one
of the scripts, in a temporary folder; ``cold`` finds it empty, ``warm`` finds the entries of the
cold run.
"""

import functools
import gc
import importlib.util
import statistics
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from simplernn_jax.cli.compilation_cache import use_compilation_cache
from simplernn_jax.config import PRECISIONS, Config, ModelConfig
from simplernn_jax.data.batches import Batch
from simplernn_jax.ops import gated_linear_recurrence
from simplernn_jax.training.losses import cross_entropy

from . import measure, train_steps
from .measure import Call, Effort, alternate, block_ratio, call_isolated, median, seconds_of
from .tables import Row, Table
from .train_steps import count_parameters, load_config, megabytes, our_step


class Shape(NamedTuple):
    """Sizes of one call."""

    batch: int
    length: int
    heads: int
    key_dim: int
    value_dim: int


SHAPES = tuple(Shape(16, 256, *sizes) for sizes in ((1, 128, 128), (4, 32, 32), (4, 64, 64)))
DTYPES = ("float32", "bfloat16")


def run_ops(effort: Effort) -> Iterator[Table]:
    """Table by shape, times in ms and memory in MB (1e6 bytes)."""
    rows = [compare_forms(shape, dtype, effort) for dtype in DTYPES for shape in SHAPES]
    yield Table("ops: forward + backward", rows)


def compare_forms(shape: Shape, dtype: str, effort: Effort) -> Row:
    """Compare the forms at one shape: time, working memory, and rate of necessary products."""
    inputs = draw_inputs(shape, dtype)
    forms = {"ours": "auto", "chunks": "chunkwise", "scan": "scan"}
    programs = {name: compile_gradients(inputs, form) for name, form in forms.items()}
    calls: dict[str, Call] = {
        name: functools.partial(program, *inputs) for name, program in programs.items()
    }
    rows = shape.batch * shape.length * shape.heads
    count = max(1, rows // 64)
    left, right = (count, 64, shape.key_dim), (count, shape.key_dim, shape.value_dim)
    calls["ceiling"], of_ceiling = measure.matmul(left, right, dtype)
    times = alternate(calls, effort)
    flops = 2.0 * rows * 6 * shape.key_dim * shape.value_dim
    return {
        "B, T, H, K, V": ", ".join(map(str, shape)),
        "dtype": dtype,
        **{f"{name} ms": 1e3 * median(times[name]) for name in forms},
        "scan / ours": block_ratio(times["scan"], times["ours"]),
        "GFLOP/s": flops / median(times["ours"]) / 1e9,
        "ceiling GFLOP/s": of_ceiling / median(times["ceiling"]) / 1e9,
        "share": flops / of_ceiling / block_ratio(times["ours"], times["ceiling"]),
        **{f"{name} MB": megabytes(program) for name, program in programs.items()},
    }


def draw_inputs(shape: Shape, dtype: str) -> tuple[jax.Array, ...]:
    """Random q, k, v, log_gate, initial state, and cotangents of output and final state.

    q, k, v and the output's cotangent have `dtype`, the others float32.
    """
    by_key, by_value = shape[:4], (*shape[:3], shape.value_dim)
    state = (shape.batch, *shape[2:])
    shapes = (by_key, by_key, by_value, by_key, state, by_value, state)
    dtypes = (dtype, dtype, dtype, "float32", "float32", dtype, "float32")
    keys = jax.random.split(jax.random.key(0), len(shapes))
    q, k, v, gate, *others = map(jax.random.normal, keys, shapes, dtypes)
    return q, jax.nn.sigmoid(k), v, jax.nn.log_sigmoid(3 + gate), *others


def compile_gradients(inputs: tuple[Any, ...], method: str) -> Any:
    """Compile output, final state and all gradients from `inputs` (`draw_inputs`)."""

    def call(q: Any, k: Any, v: Any, log_gate: Any, state: Any) -> Any:
        return gated_linear_recurrence(q, k, v, log_gate, initial_state=state, method=method)

    def results(*inputs: jax.Array) -> tuple[jax.Array, ...]:
        values, pullback = jax.vjp(call, *inputs[:5])
        return *values, *pullback(inputs[5:])

    return jax.jit(results).lower(*inputs).compile()


BATCH, LENGTH = 16, 256
_SHARES = {"base": (BATCH, LENGTH), "small": (8, 512)}
"""Sequences and their tokens, by configuration."""


def run_steps(effort: Effort) -> Iterator[Table]:
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
            "tokens/s": tokens / median(times[name]),
            "over float32": block_ratio(times["float32"], times[name]),
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

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: Any, batch: Batch) -> Any:
        loss, gradient = jax.value_and_grad(mean_loss)(state[0], batch)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
            updates, opt_state = optimizer.update(gradient, state[1], state[0])
        return (optax.apply_updates(state[0], updates), opt_state), loss

    state = params, optimizer.init(params)
    return train_steps.repeated(step, state, train_steps.random_batch(config))


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


def run_startup(effort: Effort) -> Iterator[Table]:
    """Median seconds of the first step; `effort.calls` is unused, since a process starts once."""
    pairs = []
    for _ in range(effort.blocks):
        with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
            environment = {"JAX_COMPILATION_CACHE_DIR": folder}
            pairs.append([call_isolated(seconds_of_first_step, environment) for _ in range(2)])
    cold, warm = zip(*pairs, strict=True)
    columns = {"cold": cold, "warm": warm, "warm / cold": [b / a for a, b in pairs]}
    rows = [{"cache": name, "seconds": statistics.median(x)} for name, x in columns.items()]
    yield Table("startup: first step of base after imports, by compilation cache", rows)


def seconds_of_first_step() -> float:
    """Seconds until the first step of `base` is taken; for `call_isolated`."""

    def first_step() -> Any:
        step = our_step(load_config("base", 16, 256))  # compiles
        return step()

    use_compilation_cache()
    gc.freeze()  # as scripts/train.py does
    return seconds_of(first_step)
