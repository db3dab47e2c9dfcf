"""Train steps: the `seed` model beside other implementations, and `base` beside the machine.

`seed` (two plain layers of width 128) by four programs that learn from the same tokens: ours;
ours with the recurrence by `scan`; a stack of Flax's ``nnx.RNN(nnx.GRUCell)`` of the same width;
the same equations as an eager PyTorch loop over time (needs the extra ``bench``).

`base` in float32 and bfloat16, as a share of the machine: a step counts as 6 multiply-adds per
parameter and token (one matmul forward, two backward), and the machine's rate is that of a float32
2048^3 matmul, for both precisions.
"""

import importlib.util
import math
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks import machine, tables
from benchmarks.measure import (
    Call,
    Effort,
    alternate,
    block_ratio,
    call_isolated,
    jax_peak,
    median,
)
from benchmarks.train_steps import (
    CompiledStep,
    count_parameters,
    gru_step,
    load_config,
    our_step,
    random_batch,
    scan_step,
)
from simplernn_jax import config as config_lib
from simplernn_jax.config import Config
from simplernn_jax.config_rules import PRECISIONS

BATCH, LENGTH = 16, 256

JAX_STEPS: Mapping[str, Callable[[Config], CompiledStep]] = {
    "ours": our_step,
    "scan": scan_step,
    "GRU": gru_step,
}
TORCH = "PyTorch loop"


def run(effort: Effort) -> dict[str, Any]:
    """Measure and print."""
    # Some of these steps take seconds.
    fewer = effort._replace(calls=math.ceil(effort.calls / 2))
    seed = compare_programs(load_config("seed", BATCH, LENGTH), fewer)
    tables.show(f"train: seed, B {BATCH}, T {LENGTH}, float32", seed)
    config = load_config("base", BATCH, LENGTH)
    base = compare_precisions(config, effort)
    parameters = f"{count_parameters(config):,} parameters"
    title = f"train: base, {parameters}, B {BATCH}, T {LENGTH}; 6 * parameters * tokens per step"
    tables.show(title, base)
    return {"seed": seed, "base": base}


def compare_programs(config: Config, effort: Effort) -> list[dict[str, Any]]:
    """Compare all programs that can train `config`, a plain model with one head.

    ``compiled`` is memory by XLA's memory analysis; ``peak`` is that of two steps over the memory
    held before them, in a process of its own; both in MB (1e6 bytes).
    """
    steps = {name: make(config) for name, make in JAX_STEPS.items()}
    calls: dict[str, Call] = {**steps}
    has_torch = importlib.util.find_spec("torch") is not None
    if has_torch:
        calls[TORCH] = _torch_step(config)
    times = alternate(calls, effort)
    text = config_lib.to_json(config)
    tokens = config.data.batch_size * config.data.sequence_length
    rows: list[dict[str, Any]] = []
    for name, blocks in times.items():
        peak = call_isolated(step_peak, program=name, config=text)
        rows.append(
            {
                "program": name,
                "tokens/s": tokens / median(blocks),
                "times slower than ours": block_ratio(blocks, times["ours"]),
                "compiled MB": steps[name].compiled_bytes / 1e6 if name in steps else None,
                "peak MB": None if peak is None else peak / 1e6,
            }
        )
    if not has_torch:
        rows.append({"program": f"{TORCH}: torch is not installed (pip install -e '.[bench]')"})
    return rows


def step_peak(program: str, config: str) -> float | None:
    """Peak bytes of two steps of `program` over its start; for `call_isolated`."""
    settings = config_lib.from_json(config)
    if program == TORCH:
        from benchmarks.torch_loop import torch_peak

        step = _torch_step(settings)
        return torch_peak(lambda: [step(), step()])
    compiled = JAX_STEPS[program](settings)
    compiled.prepare()
    return jax_peak(lambda: [compiled(), compiled()])


def _torch_step(config: Config) -> Call:
    from benchmarks.torch_loop import torch_step

    batch = random_batch(config)
    return torch_step(config, batch.tokens, batch.targets)


def compare_precisions(config: Config, effort: Effort, size: int = 2048) -> list[dict[str, Any]]:
    """Compare our step in float32 and bfloat16 with a float32 matmul of ``size^3``."""
    calls: dict[str, Call] = {}
    for precision in PRECISIONS:
        config.model.precision = precision
        calls[precision] = our_step(config)
    matmul = machine.square_matmul("float32", size)
    times = alternate(calls | {"matmul": matmul.call}, effort)
    tokens = config.data.batch_size * config.data.sequence_length
    flops = 6.0 * count_parameters(config) * tokens
    matmul_gflops = matmul.flops / median(times["matmul"]) / 1e9
    return [
        {
            "precision": name,
            "ms/step": 1e3 * median(times[name]),
            "tokens/s": tokens / median(times[name]),
            "over float32": block_ratio(times["float32"], times[name]),
            "GFLOP/s": flops / median(times[name]) / 1e9,
            f"float32 {size}^3 GFLOP/s": matmul_gflops,
            "share": flops / matmul.flops / block_ratio(times[name], times["matmul"]),
        }
        for name in PRECISIONS
    ]
