"""Memory of a train step against the length of its sequence, by XLA and measured.

``temporary`` is working memory by XLA's memory analysis. The peak is measured: one step, compiled
before, in a process of its own. The yardstick is a machine of 24 GiB.
"""

from typing import Any

from benchmarks import tables
from benchmarks.measure import Effort, call_isolated, jax_peak, on_simulated_devices, seconds_of
from benchmarks.train_steps import (
    BY_SCAN,
    compile_quickly,
    load_config,
    our_step,
    temporary_bytes,
)
from simplernn_jax import config as config_lib
from simplernn_jax.config import Config

LENGTHS = (256, 1024, 4096, 16384, 65536)
YARDSTICK_GIB = 24

WINDOW = 1024
DEVICES = 8
WHOLE = "whole sequence"
TECHNIQUES: dict[str, dict[str, Any]] = {
    WHOLE: {},
    f"sequence parallelism, {DEVICES} devices, each": {"sequence": DEVICES},
    "rematerialized blocks": {"remat": "block"},
    f"exact, windows of {WINDOW:,}": {"backward_window": WINDOW, "backward": "exact"},
    f"truncated, windows of {WINDOW:,}": {"backward_window": WINDOW},
}
"""Fields of `TrainConfig` or `MeshConfig` that differ from plain training."""


def run(effort: Effort) -> dict[str, Any]:
    """Measure and print; memory does not vary, so that `effort` is unused."""
    del effort
    rows = [compare(load_config("base", 1, length)) for length in LENGTHS]
    tables.show(f"memory: train step of base, B 1, float32; {YARDSTICK_GIB} GiB", rows)
    return {"rows": rows}


def compare(config: Config) -> dict[str, Any]:
    """Memory of the step of `config`, by XLA and measured, and of the step by scan, by XLA."""
    ours: dict[str, Any] = call_isolated(take_step, config=config_lib.to_json(config))
    by_scan = temporary_bytes(compile_quickly(config, BY_SCAN)) / 1e6
    peak = ours["peak GiB"]
    return {
        "T": config.data.sequence_length,
        **ours,
        "fits": None if peak is None else "yes" if peak < YARDSTICK_GIB else "no",
        "scan temporary MB": by_scan,
        "scan / ours": by_scan / ours["temporary MB"],
        "scan fits": "yes" if by_scan * 1e6 < YARDSTICK_GIB * 2**30 else "no",
    }


def take_step(config: str) -> dict[str, float | None]:
    """Memory and seconds of one step, compiled before; for `call_isolated`."""
    settings = config_lib.from_json(config)
    step = our_step(settings)
    step.prepare()
    seconds = []
    peak = jax_peak(lambda: seconds.append(seconds_of(step)))
    temporary = temporary_bytes(step.program)
    return {
        "temporary MB": temporary / 1e6,
        "kB/token": temporary / settings.data.sequence_length / 1e3,
        "peak MB over start": None if peak.over_start is None else peak.over_start / 1e6,
        "peak GiB": None if peak.total is None else peak.total / 2**30,
        "seconds": seconds[0],
    }


def compare_techniques(lengths: tuple[int, ...] = LENGTHS[1:]) -> dict[str, dict[str, float]]:
    """Working memory of `base` on one device by technique and length, in MB, by XLA."""
    arguments: dict[str, Any] = {"lengths": lengths}
    return {
        name: on_simulated_devices(fields["sequence"], megabytes, fields=fields, **arguments)
        if "sequence" in fields
        else megabytes(fields, lengths)
        for name, fields in TECHNIQUES.items()
    }


def megabytes(fields: dict[str, Any], lengths: tuple[int, ...]) -> dict[str, float]:
    """Working memory of one device by length; for `call_isolated`."""
    found = {}
    for length in lengths:
        config = load_config("base", 1, length)
        for name, value in fields.items():
            setattr(config.train if hasattr(config.train, name) else config.mesh, name, value)
        found[str(length)] = temporary_bytes(compile_quickly(config)) / 1e6
    return found
