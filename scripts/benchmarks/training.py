"""Train steps: the `seed` model beside other ways to write it, and `base` beside the machine.

`seed` (two plain layers of width 128) by four programs that learn from the same tokens: ours;
ours with the recurrence by `scan`; a stack of Flax's ``nnx.RNN(nnx.GRUCell)`` of the same width;
the same equations as an eager PyTorch loop over time (needs the extra ``bench``).

`base` in float32 and bfloat16, as a share of the machine: a step counts as 6 multiplications and
additions per parameter and token (a product forward and two backward), and the machine's rate is
that of a float32 2048^3 product, in both precisions.
"""

import importlib.util
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax

from benchmarks import machine, tables
from benchmarks.interleave import Call, Effort, Times, alternate, block_ratio, median
from benchmarks.isolated import call_isolated
from benchmarks.jax_steps import (
    CompiledStep,
    gru_step,
    load_config,
    our_step,
    random_batch,
    scan_step,
)
from benchmarks.peak_memory import jax_peak
from simplernn_jax import config as config_lib
from simplernn_jax.config import Config
from simplernn_jax.config_rules import PRECISIONS
from simplernn_jax.training.gradient import abstract_model

BATCH, LENGTH = 16, 256

JAX_STEPS: Mapping[str, Callable[[Config], CompiledStep]] = {
    "ours": our_step,
    "scan": scan_step,
    "GRU": gru_step,
}
TORCH = "PyTorch loop"


def run(effort: Effort) -> dict[str, Any]:
    """Measures and prints everything."""
    ceilings = machine.measure_ceilings(effort)
    # Some of these steps take seconds.
    fewer = effort._replace(calls=math.ceil(effort.calls / 2))
    seed = compare_programs(load_config("seed", BATCH, LENGTH), fewer)
    _show_programs(seed)
    base = compare_precisions(load_config("base", BATCH, LENGTH), effort)
    _show_precisions(base)
    print(machine.say_ceilings(ceilings))
    return {"ceilings": ceilings, "seed": seed, "base": base}


def compare_programs(config: Config, effort: Effort) -> dict[str, dict[str, float | None]]:
    """Every program that can train `config`, a plain model with one head.

    Returns:
      By program: tokens/s; how many times slower it is than ours; MB (1e6 bytes) by the compiler's
      account; MB of the peak over what was held before the first step, in a process of its own.
      Nothing under `TORCH` where torch is missing.
    """
    steps = {name: make(config) for name, make in JAX_STEPS.items()}
    compiled = {name: step.compiled_bytes for name, step in steps.items()}
    calls: dict[str, Call] = {**steps}
    has_torch = importlib.util.find_spec("torch") is not None
    if has_torch:
        calls[TORCH] = _torch_step(config)
    times = alternate(calls, effort)
    text = config_lib.to_json(config)
    peaks = {name: call_isolated(step_peak, program=name, config=text) for name in times}
    tokens = config.data.batch_size * config.data.sequence_length
    rows: dict[str, dict[str, float | None]] = {
        name: {
            "tokens_per_s": tokens / median(blocks),
            "times_slower": block_ratio(blocks, times["ours"]),
            "compiled_mb": _megabytes(compiled.get(name)),
            "peak_mb": _megabytes(peaks[name]),
        }
        for name, blocks in times.items()
    }
    return rows if has_torch else rows | {TORCH: {}}


def step_peak(program: str, config: str) -> float | None:
    """Bytes that two steps of `program` need over what is held before them; see `call_isolated`."""
    settings = config_lib.from_json(config)
    if program == TORCH:
        from benchmarks.torch_loop import torch_peak

        step = _torch_step(settings)
        return torch_peak(lambda: [step(), step()]).over_start
    compiled = JAX_STEPS[program](settings)
    compiled.prepare()
    return jax_peak(lambda: [compiled(), compiled()]).over_start


def _torch_step(config: Config) -> Call:
    from benchmarks.torch_loop import torch_step

    batch = random_batch(config)
    return torch_step(config, batch.tokens, batch.targets)


def _megabytes(num_bytes: float | None) -> float | None:
    return None if num_bytes is None else num_bytes / 1e6


def compare_precisions(config: Config, effort: Effort, size: int = 2048) -> dict[str, Any]:
    """Our step in float32 and bfloat16 as shares of a float32 product ``size^3``."""
    calls: dict[str, Call] = {}
    for precision in PRECISIONS:
        config.model.precision = precision
        calls[precision] = our_step(config)
    product = machine.square_product("float32", size)
    times = alternate(calls | {"product": product.call}, effort)
    parameters = count_parameters(config)
    tokens = config.data.batch_size * config.data.sequence_length
    return {
        "parameters": parameters,
        "product_gflops": product.amount / median(times["product"]) / 1e9,
        **{
            name: summarize_precision(parameters, tokens, times[name], times, product.amount)
            for name in PRECISIONS
        },
    }


def summarize_precision(
    parameters: int, tokens: int, blocks: Times, times: Mapping[str, Times], product_flops: float
) -> dict[str, float]:
    """Rates of one precision, of which `blocks` are the times.

    Args:
      parameters: of the model.
      tokens: of one step.
      blocks: times of its step.
      times: of ``float32``, and of the ``product`` that counts as all the machine can do.
      product_flops: floating point operations of one product.
    """
    flops = 6.0 * parameters * tokens
    return {
        "ms": 1e3 * median(blocks),
        "tokens_per_s": tokens / median(blocks),
        "gflops": flops / median(blocks) / 1e9,
        "share_of_product": flops / product_flops / block_ratio(blocks, times["product"]),
        "times_faster_than_float32": block_ratio(times["float32"], blocks),
    }


def count_parameters(config: Config) -> int:
    """Of the model; an embedding that is the head too counts once."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_model(config)[1]))


def _show_programs(rows: Mapping[str, Mapping[str, float | None]]) -> None:
    lines = [
        [
            name if row else f"{name}: torch is not installed (pip install -e '.[bench]')",
            tables.number(row.get("tokens_per_s")),
            tables.times(row.get("times_slower")),
            tables.number(row.get("compiled_mb")),
            tables.number(row.get("peak_mb")),
        ]
        for name, row in rows.items()
    ]
    headings = ["program", "tokens/s", "times slower than ours", "compiled MB", "peak MB"]
    tables.show(f"train: seed, B {BATCH}, T {LENGTH}, float32", headings, lines)


def _show_precisions(results: Mapping[str, Any]) -> None:
    lines = [
        [
            precision,
            tables.number(results[precision]["ms"], 1),
            tables.number(results[precision]["tokens_per_s"]),
            tables.times(results[precision]["times_faster_than_float32"]),
            tables.number(results[precision]["gflops"]),
            tables.number(results["product_gflops"]),
            tables.share(results[precision]["share_of_product"]),
        ]
        for precision in PRECISIONS
    ]
    headings = ["precision", "ms a step", "tokens/s", "of float32", "GFLOP/s"]
    headings += ["float32 2048^3 GFLOP/s", "share"]
    title = f"train: base, {results['parameters']:,} parameters, B {BATCH}, T {LENGTH}"
    tables.show(f"{title}; 6 * parameters * tokens a step", headings, lines)
