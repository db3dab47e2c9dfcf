"""The recurrence, forward and backward, beside its other forms and the machine's ceiling.

``ours`` is the form that `gated_linear_recurrence` chooses; on a CPU with a C compiler that is not
the chunkwise form, which is then measured beside it.

The necessary products are ``6 K V`` multiply-adds per token and head: the definition has two
products of a K x V matrix with a vector per token (k v^T, S^T q), and its gradient four (dy S^T,
q dy^T, v dS^T, k dS). Recomputation, decays, masks and copies do not count.
"""

import functools
import math
from typing import Any, NamedTuple

import jax

from benchmarks import machine, tables
from benchmarks.measure import Call, Effort, alternate, block_ratio, median
from benchmarks.train_steps import temporary_bytes
from simplernn_jax.ops import gated_linear_recurrence
from simplernn_jax.ops.chunkwise import choose_chunk_size


class Shape(NamedTuple):
    """Sizes of one call, by the legend of `simplernn_jax.array_types`."""

    batch: int
    length: int
    heads: int
    key_dim: int
    value_dim: int

    @property
    def tokens(self) -> int:
        """Tokens of the batch."""
        return self.batch * self.length


SHAPES = (
    Shape(16, 256, 1, 128, 128),
    Shape(16, 256, 4, 32, 32),
    Shape(16, 256, 4, 64, 64),
)
DTYPES = ("float32", "bfloat16")
LENGTHS = (256, 1024, 4096, 16384)
LENGTH_TOKENS = 16384
"""B T of the comparison of lengths: one sequence at the greatest length."""
CEILING_ROWS = 64


def run(effort: Effort) -> dict[str, Any]:
    """Measure and print; times in ms, memory in MB (1e6 bytes)."""
    # Scan takes a second per call.
    fewer = effort._replace(calls=math.ceil(effort.calls / 2))
    rows = [compare(shape, dtype, fewer) for dtype in DTYPES for shape in SHAPES]
    tables.show("ops: forward + backward", rows)
    by_length = [
        compare_lengths(LENGTHS, LENGTH_TOKENS, shape, dtype, effort)
        for dtype in DTYPES
        for shape in SHAPES[:2]
    ]
    tables.show(f"ops: us per token, B T = {LENGTH_TOKENS:,}, and relative", by_length)
    return {"shapes": rows, "lengths": by_length}


def compare(shape: Shape, dtype: str, effort: Effort) -> dict[str, Any]:
    """Compare the forms at one shape: time, working memory, and rate of necessary products."""
    inputs = draw_inputs(shape, dtype)
    forms: dict[str, dict[str, Any]] = {
        "ours": {},
        "chunks": {"chunk_size": choose_chunk_size(shape.length)},
        "scan": {"method": "scan"},
    }
    programs = {name: compile_gradients(inputs, **options) for name, options in forms.items()}
    count = max(1, shape.tokens * shape.heads // CEILING_ROWS)
    ceiling = machine.batched_matmul(count, CEILING_ROWS, shape.key_dim, shape.value_dim, dtype)
    calls: dict[str, Call] = {
        name: functools.partial(program, *inputs) for name, program in programs.items()
    }
    times = alternate(calls | {"ceiling": ceiling.call}, effort)
    flops = necessary_flops(shape)
    return {
        "B, T, H, K, V": ", ".join(map(str, shape)),
        "dtype": dtype,
        **{f"{name} ms": 1e3 * median(times[name]) for name in forms},
        "scan / ours": block_ratio(times["scan"], times["ours"]),
        "GFLOP/s": flops / median(times["ours"]) / 1e9,
        "ceiling GFLOP/s": ceiling.flops / median(times["ceiling"]) / 1e9,
        "share": flops / ceiling.flops / block_ratio(times["ours"], times["ceiling"]),
        **{f"{name} MB": temporary_bytes(program) / 1e6 for name, program in programs.items()},
    }


def necessary_flops(shape: Shape) -> float:
    """Operations of the definition and its gradient."""
    return 2.0 * shape.tokens * shape.heads * 6 * shape.key_dim * shape.value_dim


def compare_lengths(
    lengths: tuple[int, ...], tokens: int, widths: Shape, dtype: str, effort: Effort
) -> dict[str, Any]:
    """Time per token by length at constant B T, and relative to the first length."""
    calls: dict[str, Call] = {}
    for length in lengths:
        inputs = draw_inputs(widths._replace(batch=tokens // length, length=length), dtype)
        calls[str(length)] = functools.partial(compile_gradients(inputs), *inputs)
    times = alternate(calls, effort)
    first = times[str(lengths[0])]
    row: dict[str, Any] = {"H, K, V": ", ".join(map(str, widths[2:])), "dtype": dtype}
    row |= {f"T {name}": 1e6 * median(blocks) / tokens for name, blocks in times.items()}
    return row | {
        f"T {name} / T {lengths[0]}": block_ratio(blocks, first)
        for name, blocks in list(times.items())[1:]
    }


def draw_inputs(shape: Shape, dtype: str) -> tuple[jax.Array, ...]:
    """Random q, k, v, log_gate, initial state, and cotangents of output and final state.

    q, k, v and the output's cotangent have `dtype`, the others float32.
    """
    keys = jax.random.split(jax.random.key(0), 7)
    by_key = (shape.batch, shape.length, shape.heads, shape.key_dim)
    by_value = (*by_key[:3], shape.value_dim)
    state = (shape.batch, *shape[2:])
    return (
        jax.random.normal(keys[0], by_key, dtype),
        jax.nn.sigmoid(jax.random.normal(keys[1], by_key, dtype)),
        jax.random.normal(keys[2], by_value, dtype),
        jax.nn.log_sigmoid(3 + jax.random.normal(keys[3], by_key)),
        jax.random.normal(keys[4], state),
        jax.random.normal(keys[5], by_value, dtype),
        jax.random.normal(keys[6], state),
    )


def compile_gradients(inputs: tuple[Any, ...], **options: Any) -> Any:
    """Compile output, final state and all gradients from `inputs` (`draw_inputs`)."""

    def results(*inputs: jax.Array) -> tuple[jax.Array, ...]:
        def call(q: Any, k: Any, v: Any, log_gate: Any, state: Any) -> Any:
            return gated_linear_recurrence(q, k, v, log_gate, initial_state=state, **options)

        values, pullback = jax.vjp(call, *inputs[:5])
        return *values, *pullback(inputs[5:])

    return jax.jit(results).lower(*inputs).compile()
