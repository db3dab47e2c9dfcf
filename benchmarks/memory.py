"""Memory of a train step of `base` on one row, against its length: ours and by `scan`.

``temporary`` is the compiler's account of working memory. The peak is measured: one step, compiled
before, in a process of its own; over what was held before the step, and in total. A machine of
24 GiB is the yardstick: what fits there, and what a row of 65,536 tokens takes.
"""

from typing import Any

from benchmarks import tables
from benchmarks.interleave import Effort, seconds_of
from benchmarks.isolated import call_isolated
from benchmarks.jax_steps import load_config, our_step, scan_step
from benchmarks.peak_memory import jax_peak
from simplernn_jax import config as config_lib
from simplernn_jax.config import Config

LENGTHS = (256, 1024, 4096, 16384, 65536)
YARDSTICK = 24 * 2**30


def run(effort: Effort) -> dict[str, Any]:
    """Measures and prints everything; memory is no matter of chance, so that `effort` is unused."""
    del effort
    rows = [compare(load_config("base", 1, length)) for length in LENGTHS]
    _show(rows)
    return {"yardstick_bytes": YARDSTICK, "rows": rows}


def compare(config: Config) -> dict[str, Any]:
    """The step of `config`: bytes by the compiler's account, ours and by scan, and measured."""
    ours: dict[str, Any] = call_isolated(take_step, config=config_lib.to_json(config))
    by_scan = {"scan_temporary_bytes": scan_step(config).temporary_bytes}
    return {"length": config.data.sequence_length} | ours | by_scan


def take_step(config: str) -> dict[str, float | None]:
    """Our step once, compiled before: bytes by the compiler's account and measured, and seconds."""
    step = our_step(config_lib.from_json(config))
    step.prepare()
    seconds = []
    peak = jax_peak(lambda: seconds.append(seconds_of(step)))
    return {
        "temporary_bytes": step.temporary_bytes,
        "peak_bytes_over_start": peak.over_start,
        "peak_bytes": peak.total,
        "seconds": seconds[0],
    }


def _show(rows: list[dict[str, Any]]) -> None:
    lines = [
        [
            f"{row['length']:,}",
            tables.number(row["temporary_bytes"] / 1e6),
            tables.number(row["temporary_bytes"] / row["length"] / 1e3, 1),
            tables.number(row["scan_temporary_bytes"] / 1e6),
            tables.times(row["scan_temporary_bytes"] / row["temporary_bytes"]),
            "yes" if row["scan_temporary_bytes"] < YARDSTICK else "no",
            tables.number(_in(1e6, row["peak_bytes_over_start"])),
            tables.number(_in(2**30, row["peak_bytes"]), 2),
            tables.number(row["seconds"], 2),
        ]
        for row in rows
    ]
    headings = ["T", "ours temporary MB", "kB a token", "scan temporary MB", "scan / ours"]
    headings += ["scan fits 24 GiB", "ours peak MB over start", "ours peak GiB", "first step s"]
    tables.show("memory: train step of base, B 1, float32", headings, lines)
    largest, peak = rows[-1]["length"], rows[-1]["peak_bytes"]
    if peak is not None:
        verdict = "trains" if peak < YARDSTICK else "does not train"
        print(f"one row of {largest:,} tokens {verdict} on 24 GiB")


def _in(unit: float, num_bytes: float | None) -> float | None:
    return None if num_bytes is None else num_bytes / unit
