"""Working memory of a train step of `base` on one sequence, by XLA's memory analysis.

By length and technique: the plain step, the recurrence by scan, and the ways to save memory.
"""

from pathlib import Path
from typing import Any

from benchmarks import tables
from benchmarks.measure import Effort, on_simulated_devices
from benchmarks.train_steps import BY_SCAN, compile_quickly, load_config, temporary_bytes
from simplernn_jax.files import write_file
from simplernn_jax.ops import gated_linear_recurrence

LENGTHS = (1024, 4096, 16384, 65536)
WINDOW = 1024
DEVICES = 8
SCAN = "plain, by scan"
TECHNIQUES: dict[str, dict[str, Any]] = {
    "plain": {},
    SCAN: {},
    f"sequence parallelism, {DEVICES} devices, each": {"sequence": DEVICES},
    "rematerialized blocks": {"remat": "block"},
    f"exact, windows of {WINDOW:,}": {"backward_window": WINDOW, "backward": "exact"},
    f"truncated, windows of {WINDOW:,}": {"backward_window": WINDOW},
}
"""Fields of `TrainConfig` or `MeshConfig` that differ from plain training."""


def run(effort: Effort) -> dict[str, Any]:
    """Measure and print; memory does not vary, so that `effort` is unused."""
    del effort
    curves = compare()
    tables.show("memory: train step of base, B 1, float32, MB", tables.by_x("T", curves))
    return curves


def compare(lengths: tuple[int, ...] = LENGTHS) -> dict[str, dict[str, float]]:
    """MB on one device by technique and length."""
    return {
        name: on_simulated_devices(fields["sequence"], megabytes, technique=name, lengths=lengths)
        if "sequence" in fields
        else megabytes(name, lengths)
        for name, fields in TECHNIQUES.items()
    }


def megabytes(technique: str, lengths: tuple[int, ...]) -> dict[str, float]:
    """MB on one device by length; for `call_isolated`."""
    found = {}
    for length in lengths:
        config = load_config("base", 1, length)
        for name, value in TECHNIQUES[technique].items():
            setattr(config.train if hasattr(config.train, name) else config.mesh, name, value)
        recurrence = BY_SCAN if technique == SCAN else gated_linear_recurrence
        found[str(length)] = temporary_bytes(compile_quickly(config, recurrence)) / 1e6
    return found


def draw(curves: dict[str, dict[str, float]], folder: Path) -> Path:
    """Write a picture of what `run` returned; return its path."""
    path = folder / "memory_against_length.png"
    panels = {"working memory of a train step of base, MB": curves}
    write_file(path, tables.draw(panels, "tokens of one sequence"))
    return path
