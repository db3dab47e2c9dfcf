"""Sizes of compiled train steps that do not run, by XLA's memory analysis for CPUs.

Memory and communication on eight simulated devices, with the chunkwise recurrence, as on GPUs:
bytes are those of the collectives' results on one device, those of the loop over microbatches times
their number. And the working memory of a step of `base` on one sequence.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from simplernn_jax import project
from simplernn_jax.cli import config_files
from simplernn_jax.config import Config

from .measure import on_simulated_devices
from .tables import Row, Table
from .train_steps import (
    change,
    collectives,
    compile_quickly,
    count_parameters,
    load_config,
    megabytes,
    with_method,
)

DEVICES = 8
NAMES = ("small", "gpt2_size")
MESHES: tuple[Mapping[str, int], ...] = ({"data": 8}, {"fsdp": 8}, {"tensor": 4, "fsdp": 2})
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{\n((?:  .*\n)*)", re.MULTILINE)


def run() -> Iterator[Table]:
    """The table of `NAMES` on `MESHES`."""
    rows: list[Row] = []
    for name in NAMES:
        config = config_files.load_config(project.ROOT / "configs" / f"{name}.py")
        for sizes in MESHES:
            change(config, **{"data": 1, "fsdp": 1, "tensor": 1} | dict(sizes))
            measured = on_simulated_devices(DEVICES, measure_step, config=config)
            mesh = ", ".join(f"{axis} {size}" for axis, size in sizes.items())
            rows.append({"configuration": name, "mesh": mesh} | measured)
    yield Table("sizes: a train step on 8 devices, MB of one device", rows)


def measure_step(config: Config) -> Row:
    """Sizes of the train step of `config` on one device; for `on_simulated_devices`."""
    program = compile_quickly(with_method(config, "chunkwise"))
    memory, exchanged = program.memory_analysis(), bytes_by_kind(program.as_text(), config)
    row: Row = {
        "parameters": count_parameters(config),
        "sequences": f"{config.data.batch_size:,} of {config.data.sequence_length:,}",
        "microbatches": config.train.gradient_accumulation or 1,
        "state and batch": memory.argument_size_in_bytes / 1e6,
        "working memory": memory.temp_size_in_bytes / 1e6,
    }
    kinds = ("all-reduce", "all-gather", "reduce-scatter")
    others = exchanged.keys() - set(kinds)
    return row | {kind: exchanged[kind] / 1e6 for kind in [*kinds, *sorted(others)]}


def bytes_by_kind(text: str, config: Config) -> Counter[str]:
    """Bytes of the results of all collectives of one step, by kind.

    The only loop with collectives is that over microbatches, without BPTT windows and shards of
    time.
    """
    repeats = (config.train.gradient_accumulation or 1) - 1
    exchanged: Counter[str] = Counter()
    for part, times in ((text, 1), (text_of_loops(text), repeats)):
        for (kind, size), count in collectives(part).items():
            exchanged[kind] += times * count * size
    return exchanged


def text_of_loops(text: str) -> str:
    """The computations of a compiled program that loops run, directly or by calls."""
    computations = dict(_COMPUTATION.findall(text))
    inside: set[str] = set()
    new = set(re.findall(r"body=%?([\w.-]+)", text))
    while new:
        inside |= new
        called = {name for one in new for name in re.findall(r"[\w.-]+", computations[one])}
        new = (called & computations.keys()) - inside
    return "".join(computations[name] for name in sorted(inside))


LENGTHS = (1024, 4096, 16384, 65536)
SCAN = "plain, by scan"
TECHNIQUES: dict[str, dict[str, Any]] = {
    "plain": {},
    SCAN: {},
    "sequence parallelism, 8 devices, each": {"sequence": 8},
    "rematerialized blocks": {"remat": "block"},
    "exact, windows of 1,024": {"bptt_window": 1024, "bptt": "full"},
    "truncated, windows of 1,024": {"bptt_window": 1024},
}
"""Fields of the configuration that differ from plain training."""


def run_memory() -> Iterator[Table]:
    """MB on one device by technique and length, which do not vary."""
    curves = {
        name: on_simulated_devices(
            fields.get("sequence", 1), measure_memory, technique=name, lengths=LENGTHS
        )
        for name, fields in TECHNIQUES.items()
    }
    panels = {"working memory of a train step of base, MB": curves}
    yield Table(
        "memory: train step of base, B 1, float32", panels=panels, x="tokens", picture="memory"
    )


def measure_memory(technique: str, lengths: tuple[int, ...]) -> dict[str, float]:
    """MB on one device by length; for `on_simulated_devices`."""
    method = "scan" if technique == SCAN else "auto"
    configs = {n: load_config("base", 1, n, **TECHNIQUES[technique]) for n in lengths}
    return {
        str(n): megabytes(compile_quickly(with_method(each, method))) for n, each in configs.items()
    }
