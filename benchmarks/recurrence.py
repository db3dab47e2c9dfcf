"""The recurrence, forward and backward, compared with its other forms and batched matmuls.

``ours`` is the form that `gated_linear_recurrence` chooses. The necessary products are ``6 K V``
multiply-adds per token and head: the definition has two products of a K x V matrix with a vector
per token (k v^T, S^T q), and its gradient four (dy S^T, q dy^T, v dS^T, k dS).
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from simplernn_jax.ops import gated_linear_recurrence

from . import measure
from .measure import Call, Effort, alternate, block_ratio, median
from .tables import Row, Table
from .train_steps import megabytes


class Shape(NamedTuple):
    """Sizes of one call."""

    batch: int
    length: int
    heads: int
    key_dim: int
    value_dim: int


SHAPES = tuple(Shape(16, 256, *sizes) for sizes in ((1, 128, 128), (4, 32, 32), (4, 64, 64)))
DTYPES = ("float32", "bfloat16")


def run(effort: Effort) -> Iterator[Table]:
    """Table by shape, times in ms and memory in MB (1e6 bytes)."""
    rows = [compare(shape, dtype, effort) for dtype in DTYPES for shape in SHAPES]
    yield Table("ops: forward + backward", rows)


def compare(shape: Shape, dtype: str, effort: Effort) -> Row:
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
