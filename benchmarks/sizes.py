"""Memory and communication of a train step on eight simulated devices, compiled and not run.

The recurrence is chunkwise, as on GPUs. Memory is XLA's analysis for CPUs, of one device. Bytes are
those of the collectives' results on one device, those of the loop over microbatches times their
number.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping

from simplernn_jax import config_files
from simplernn_jax.config import Config

from .measure import Effort, on_simulated_devices
from .tables import Row, Table
from .train_steps import change, collectives, compile_quickly, count_parameters, with_method

TITLE = "sizes: a train step on 8 devices, MB of one device"
DEVICES = 8
NAMES = ("small", "gpt2_size")
MESHES: tuple[Mapping[str, int], ...] = ({"data": 8}, {"fsdp": 8}, {"tensor": 4, "fsdp": 2})
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{\n((?:  .*\n)*)", re.MULTILINE)


def run(_: Effort) -> Iterator[Table]:
    """The table; a compiled program does not vary."""
    yield TITLE, [row for name in NAMES for row in compare_meshes(name)]


def compare_meshes(name: str) -> list[Row]:
    """Compile ``configs/NAME.py`` on each of `MESHES`."""
    config = config_files.load_config(name)
    rows: list[Row] = []
    for sizes in MESHES:
        change(config, **{"data": 1, "fsdp": 1, "tensor": 1} | dict(sizes))
        measured = on_simulated_devices(DEVICES, measure_step, config=config)
        mesh = ", ".join(f"{axis} {size}" for axis, size in sizes.items())
        rows.append({"configuration": name, "mesh": mesh} | measured)
    return rows


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
