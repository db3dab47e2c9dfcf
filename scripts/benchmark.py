"""Measures speed and memory beside a baseline and the machine's own ceiling, in one run.

    python scripts/benchmark.py ops [--out FILE.json]

What is compared runs in alternating blocks of one process (A B A B ...), compiled and warmed up;
the first call of every block is dropped. Times are medians; the ratio is the median over blocks.
"""

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from rich.console import Console
from rich.table import Table

from simplernn_jax import command_line
from simplernn_jax.errors import UserError
from simplernn_jax.ops import gated_linear_recurrence

_ARGUMENTS = command_line.define_arguments("ops")
_OUT = flags.DEFINE_string("out", None, "Write the results as JSON to this file.")
_BLOCKS = flags.DEFINE_integer("blocks", 5, "Alternating blocks.", lower_bound=2)
_CALLS = flags.DEFINE_integer("calls", 4, "Timed calls per block and candidate.", lower_bound=1)

OPERATOR_SHAPES = ((16, 256, 1, 128, 128), (16, 256, 4, 32, 32), (16, 256, 4, 64, 64))
"""B, T, H, K, V."""


def main() -> int:
    """Runs the benchmarks that the arguments name."""
    benchmarks = {"ops": benchmark_ops}
    names = _ARGUMENTS.value
    if not names or not set(names) <= set(benchmarks):
        raise UserError(f"name what to measure: python scripts/benchmark.py {'|'.join(benchmarks)}")
    results = {"machine": describe_machine(), **{name: benchmarks[name]() for name in names}}
    if _OUT.value:
        Path(_OUT.value).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return 0


def benchmark_ops() -> list[dict[str, Any]]:
    """The recurrence forward and backward: chunkwise beside scan, and the machine's ceiling."""
    rows = []
    table = Table(title="recurrence, forward + backward, float32")
    for heading in ("B, T, H, K, V", "chunkwise ms", "scan ms", "times faster"):
        table.add_column(heading, justify="right")
    for heading in ("memory MB", "scan MB", "scan / ours", "GFLOP/s", "ceiling", "share"):
        table.add_column(heading, justify="right")
    for shape in OPERATOR_SHAPES:
        inputs = operator_inputs(*shape)
        programs = {method: compile_operator(method, inputs) for method in ("chunkwise", "scan")}
        calls = {name: _bind(program, inputs) for name, program in programs.items()}
        calls["ceiling"] = _batched_product(shape)
        times = alternate(calls)
        memory = {
            name: program.memory_analysis().temp_size_in_bytes / 1e6
            for name, program in programs.items()
        }
        row = summarize_operator(shape, times, memory)
        rows.append(row)
        table.add_row(
            str(shape),
            f"{row['chunkwise_ms']:.1f}",
            f"{row['scan_ms']:.0f}",
            f"{row['times_faster']:.1f}",
            f"{row['chunkwise_mb']:.0f}",
            f"{row['scan_mb']:.0f}",
            f"{row['scan_mb'] / row['chunkwise_mb']:.1f}",
            f"{row['gflops']:.0f}",
            f"{row['ceiling_gflops']:.0f}",
            f"{row['gflops'] / row['ceiling_gflops']:.0%}",
        )
    Console(width=130).print(table)
    return rows


def operator_inputs(batch: int, length: int, heads: int, key_dim: int, value_dim: int) -> Any:
    """q, k, v, log_gate, initial state and the output's cotangent."""
    keys = jax.random.split(jax.random.key(0), 6)
    shape = (batch, length, heads)
    return (
        jax.random.normal(keys[0], (*shape, key_dim)),
        jax.nn.sigmoid(jax.random.normal(keys[1], (*shape, key_dim))),
        jax.random.normal(keys[2], (*shape, value_dim)),
        jax.nn.log_sigmoid(3 + jax.random.normal(keys[3], (*shape, key_dim))),
        jax.random.normal(keys[4], (batch, heads, key_dim, value_dim)),
        jax.random.normal(keys[5], (*shape, value_dim)),
    )


def compile_operator(method: str, inputs: Any) -> Any:
    """The gradients of all five inputs as one compiled program."""

    def gradients(q, k, v, log_gate, state, cotangent):  # type: ignore[no-untyped-def]
        def call(*inputs):  # type: ignore[no-untyped-def]
            q, k, v, log_gate, state = inputs
            return gated_linear_recurrence(q, k, v, log_gate, initial_state=state, method=method)

        (output, final_state), pullback = jax.vjp(call, q, k, v, log_gate, state)
        return output, final_state, pullback((cotangent, final_state))

    return jax.jit(gradients).lower(*inputs).compile()


def summarize_operator(
    shape: tuple[int, ...], times: dict[str, list[list[float]]], memory: dict[str, float]
) -> dict[str, Any]:
    """Medians, the ratio block by block, and the rate of the necessary products."""
    batch, length, heads, key_dim, value_dim = shape
    # Per token and head, forward: S^T q and k v^T; backward: dS q^T, S dy, dS^T k, dS v. Each is
    # one product of K V multiply-adds. What is added inside chunks is a choice, not a need.
    necessary = 2 * 6 * batch * length * heads * key_dim * value_dim
    ms = {name: 1e3 * median(blocks) for name, blocks in times.items()}
    return {
        "shape": shape,
        "chunkwise_ms": ms["chunkwise"],
        "scan_ms": ms["scan"],
        "times_faster": block_ratio(times["scan"], times["chunkwise"]),
        "chunkwise_mb": memory["chunkwise"],
        "scan_mb": memory["scan"],
        "gflops": necessary / ms["chunkwise"] / 1e6,
        "ceiling_gflops": _product_flops(shape) / ms["ceiling"] / 1e6,
    }


def _product_flops(shape: tuple[int, ...]) -> float:
    batch, length, heads, key_dim, value_dim = shape
    return 2.0 * batch * length * heads * key_dim * value_dim


def _batched_product(shape: tuple[int, ...]) -> Callable[[], Any]:
    """The ceiling: ``[64, K] x [K, V]`` for every 64 tokens of every head."""
    batch, length, heads, key_dim, value_dim = shape
    keys = jax.random.split(jax.random.key(0))
    count = batch * heads * length // 64
    left = jax.random.normal(keys[0], (count, 64, key_dim))
    right = jax.random.normal(keys[1], (count, key_dim, value_dim))
    return _bind(jax.jit(jnp.matmul), (left, right))


def _bind(function: Callable[..., Any], arguments: Any) -> Callable[[], Any]:
    return lambda: function(*arguments)


def alternate(calls: dict[str, Callable[[], Any]]) -> dict[str, list[list[float]]]:
    """Seconds of every timed call, per candidate and block; candidates take turns."""
    times: dict[str, list[list[float]]] = {name: [] for name in calls}
    for call in calls.values():
        jax.block_until_ready(call())
    for _ in range(_BLOCKS.value):
        for name, call in calls.items():
            block = []
            for _ in range(_CALLS.value + 1):
                start = time.perf_counter()
                jax.block_until_ready(call())
                block.append(time.perf_counter() - start)
            times[name].append(block[1:])
    return times


def median(blocks: list[list[float]]) -> float:
    """Median over all calls of all blocks."""
    return statistics.median(seconds for block in blocks for seconds in block)


def block_ratio(slower: list[list[float]], faster: list[list[float]]) -> float:
    """Median over blocks of the ratio of the blocks' medians."""
    return statistics.median(
        statistics.median(a) / statistics.median(b) for a, b in zip(slower, faster, strict=True)
    )


def describe_machine() -> dict[str, Any]:
    """Processor or card, versions, and the commit that is measured."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        check=False,
    ).stdout.strip()
    return {
        "device": jax.devices()[0].device_kind,
        "processor": _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("jax", "flax", "numpy")},
        "commit": commit,
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


if __name__ == "__main__":
    command_line.run(main)
