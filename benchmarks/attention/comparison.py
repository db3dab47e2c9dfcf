"""Runs the measurements one after another and writes what they gave into a folder."""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks import machine
from benchmarks.attention import (
    communication,
    corpus,
    cost,
    distance,
    interpretability,
    memory,
    parallelism,
    recall,
    report,
)
from simplernn_jax.errors import UserError
from simplernn_jax.files import write_file

MEASUREMENTS: Mapping[str, ModuleType] = {
    "parallelism": parallelism,
    "memory": memory,
    "cost": cost,
    "communication": communication,
    "interpretability": interpretability,
    "corpus": corpus,
    "recall": recall,
    "distance": distance,
}
"""Each has ``QUICK`` and ``FULL`` sizes, and ``measure(sizes)`` whose result survives JSON."""


_PARTS = {"measured", "sizes", "quick", "seconds", "machine"}
"""Of what is kept of a measurement."""


def run(out: Path, quick: bool, names: Sequence[str]) -> None:
    """Measures, and writes results.json, table.md and the pictures after each measurement.

    Measurements that are not named are taken from the results.json that is there.

    Args:
      out: folder, which exists.
      quick: small sizes.
      names: of `MEASUREMENTS`.

    Raises:
      UserError: the results.json that is there is none.
    """
    path = out / "results.json"
    results = _earlier(path)
    for name in names:
        module = MEASUREMENTS[name]
        sizes = module.QUICK if quick else module.FULL
        print(f"measuring {name} ...", flush=True)
        start = time.perf_counter()
        measured = module.measure(sizes)
        results[name] = {
            "measured": measured,
            "sizes": sizes._asdict(),
            "quick": quick,
            "seconds": time.perf_counter() - start,
            "machine": machine.describe(),
        }
        write_file(str(path), (json.dumps(results, indent=2) + "\n").encode("utf-8"))
        first = report.write(out, _earlier(path))
    print(f"{first}\nwritten: {out / 'table.md'}, its pictures, and results.json")


def _earlier(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); remove it, or name another --out") from error
    is_whole = isinstance(results, dict) and all(
        isinstance(results[name], dict) and set(results[name]) >= _PARTS
        for name in MEASUREMENTS
        if name in results
    )
    if not is_whole:
        raise UserError(f"{path}: not what this benchmark writes; remove it, or name another --out")
    return {name: results[name] for name in MEASUREMENTS if name in results}
