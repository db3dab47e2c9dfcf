"""The recurrence, forward and backward, beside its other forms and the machine's ceiling.

``ours`` is the form that `gated_linear_recurrence` chooses; on a CPU with a C compiler that is not
the chunkwise form, which is then measured beside it.

Two counts of the necessary products, in multiply-adds per token and head:

- *recurrence*: ``6 K V``. The definition has two products of a K x V matrix with a vector per
  token (k v^T, S^T q) and its gradient four (dy S^T, q dy^T, v dS^T, k dS).
- *chunks*: ``6 K V + 3/2 C (K + V)``. The same six, now per chunk of C tokens as matmuls
  (forward: Q S, K^T V; backward: dO S^T, Q^T dO, V dS^T, K dS), and those inside the chunk:
  forward A = Q K^T and A V; backward dA = dO V^T, A^T dO, dA K, dA^T Q. A and dA are causal, so
  that only half of each of these counts, C^2 / 2 entries.

Neither counts recomputation in the backward pass, decays, masks or copies.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import machine, tables
from benchmarks.measure import Call, Effort, Times, alternate, block_ratio, median
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

RESULTS = ("output", "final_state", "d_q", "d_k", "d_v", "d_log_gate", "d_initial_state")


def run(effort: Effort) -> dict[str, Any]:
    """Measure and print; times in ms, memory in MB (1e6 bytes)."""
    # Scan takes a second per call.
    fewer = effort._replace(calls=math.ceil(effort.calls / 2))
    rows = [compare(shape, dtype, fewer) for dtype in DTYPES for shape in SHAPES]
    tables.show("ops: forward + backward; RMS error against scan in float64", rows)
    by_length = [
        compare_lengths(LENGTHS, LENGTH_TOKENS, shape, dtype, effort)
        for dtype in DTYPES
        for shape in SHAPES[:2]
    ]
    tables.show(f"ops: us per token, B T = {LENGTH_TOKENS:,}, and relative", by_length)
    return {"shapes": rows, "lengths": by_length}


def compare(shape: Shape, dtype: str, effort: Effort) -> dict[str, Any]:
    """Compare the forms at one shape: time, memory, rate of necessary products, RMS error."""
    inputs = draw_inputs(shape, dtype)
    programs = {
        name: compile_gradients(inputs, **options) for name, options in forms(shape).items()
    }
    count = max(1, shape.tokens * shape.heads // CEILING_ROWS)
    ceiling = machine.batched_matmul(count, CEILING_ROWS, shape.key_dim, shape.value_dim, dtype)
    calls: dict[str, Call] = {
        name: functools.partial(program, *inputs) for name, program in programs.items()
    }
    times = alternate(calls | {"ceiling": ceiling.call}, effort)
    exact = exact_results(inputs)
    row: dict[str, Any] = {"B, T, H, K, V": ", ".join(map(str, shape)), "dtype": dtype}
    row |= summarize_times(shape, times, ceiling.flops)
    for name, program in programs.items():
        row[f"{name} MB"] = program.memory_analysis().temp_size_in_bytes / 1e6
        errors = rms_errors(program(*inputs), exact)
        row[f"{name} error of d log_gate"] = errors.pop("d_log_gate")
        row[f"{name} error of others"] = max(errors.values())
    return row


def summarize_times(
    shape: Shape, times: Mapping[str, Times], ceiling_flops: float
) -> dict[str, Any]:
    """Medians, the speedup over scan, and both counts of necessary products as rates.

    Args:
      shape: of the call.
      times: of the candidates ``ours``, ``chunks``, ``scan`` and ``ceiling``.
      ceiling_flops: floating point operations of one call of the ceiling.
    """
    chunk = choose_chunk_size(shape.length)
    counts = {"recurrence": recurrence_flops(shape), "chunks": chunk_flops(shape, chunk)}
    seconds = {name: median(blocks) for name, blocks in times.items()}
    slower_than_ceiling = block_ratio(times["ours"], times["ceiling"])
    return {
        **{f"{name} ms": 1e3 * seconds[name] for name in ("ours", "chunks", "scan")},
        "scan / ours": block_ratio(times["scan"], times["ours"]),
        "ceiling GFLOP/s": ceiling_flops / seconds["ceiling"] / 1e9,
        **{f"{name} GFLOP/s": n / seconds["ours"] / 1e9 for name, n in counts.items()},
        **{
            f"{name} of ceiling": n / ceiling_flops / slower_than_ceiling
            for name, n in counts.items()
        },
    }


def recurrence_flops(shape: Shape) -> float:
    """Necessary operations of the definition: 6 K V multiply-adds per token and head."""
    return 2.0 * shape.tokens * shape.heads * 6 * shape.key_dim * shape.value_dim


def chunk_flops(shape: Shape, chunk: int) -> float:
    """Necessary operations with chunks of `chunk` tokens."""
    inside = 1.5 * chunk * (shape.key_dim + shape.value_dim)
    return recurrence_flops(shape) + 2.0 * shape.tokens * shape.heads * inside


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


def forms(shape: Shape) -> dict[str, dict[str, Any]]:
    """Options of `gated_linear_recurrence` for each of its forms."""
    return {
        "ours": {},
        "chunks": {"chunk_size": choose_chunk_size(shape.length)},
        "scan": {"method": "scan"},
    }


def compile_gradients(inputs: tuple[Any, ...], **options: Any) -> Any:
    """Compile the program from `inputs` (`draw_inputs`) to `RESULTS`; `options` as in `forms`."""

    def results(*inputs: jax.Array) -> tuple[jax.Array, ...]:
        def call(q: Any, k: Any, v: Any, log_gate: Any, state: Any) -> Any:
            return gated_linear_recurrence(q, k, v, log_gate, initial_state=state, **options)

        values, pullback = jax.vjp(call, *inputs[:5])
        return *values, *pullback(inputs[5:])

    return jax.jit(results).lower(*inputs).compile()


def exact_results(inputs: tuple[jax.Array, ...]) -> list[np.ndarray]:
    """`RESULTS` of the same inputs by scan in float64."""
    with jax.enable_x64(True):
        exact = tuple(jnp.asarray(np.asarray(x).astype(np.float64)) for x in inputs)
        return [np.asarray(x) for x in compile_gradients(exact, method="scan")(*exact)]


def rms_errors(results: Any, exact: list[np.ndarray]) -> dict[str, float]:
    """RMS(difference) / RMS(exact) of each of `RESULTS`."""

    def rms(x: np.ndarray) -> float:
        return float(np.sqrt(np.mean(x**2)))

    return {
        name: rms(np.asarray(result).astype(np.float64) - reference) / rms(reference)
        for name, result, reference in zip(RESULTS, results, exact, strict=True)
    }
