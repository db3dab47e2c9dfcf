"""Working memory of a train step of `base` on one sequence, by XLA's memory analysis."""

from collections.abc import Iterator
from typing import Any

from . import tables
from .measure import Effort, on_simulated_devices
from .train_steps import compile_quickly, load_config, megabytes, with_method

TITLE = "memory: train step of base, B 1, float32, MB"
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


def run(_: Effort) -> Iterator[tables.Table]:
    """The table; memory does not vary, so that it is measured once."""
    yield TITLE, tables.by_x("T", compare(LENGTHS))


def compare(lengths: tuple[int, ...]) -> tables.Curves:
    """MB on one device by technique and length."""
    return {
        name: on_simulated_devices(fields["sequence"], measure, technique=name, lengths=lengths)
        if "sequence" in fields
        else measure(name, lengths)
        for name, fields in TECHNIQUES.items()
    }


def measure(technique: str, lengths: tuple[int, ...]) -> dict[str, float]:
    """MB on one device by length; for `on_simulated_devices`."""
    method = "scan" if technique == SCAN else "auto"
    configs = {n: load_config("base", 1, n, **TECHNIQUES[technique]) for n in lengths}
    return {
        str(n): megabytes(compile_quickly(with_method(each, method))) for n, each in configs.items()
    }


def draw(rows: list[tables.Row]) -> bytes:
    """A PNG file of the table."""
    curves = {name: {str(row["T"]): row[name] for row in rows} for name in TECHNIQUES}
    return tables.draw({"working memory of a train step of base, MB": curves}, "tokens")
