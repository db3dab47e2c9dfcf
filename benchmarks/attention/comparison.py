"""Run the measurements and write their results into a folder."""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.attention import corpus, report, resources, synthetic, work
from simplernn_jax.errors import UserError
from simplernn_jax.files import write_file

MEASUREMENTS: Mapping[str, report.Measurement] = {
    "parallelism": work.PARALLELISM,
    "memory": resources.MEMORY,
    "cost": work.COST,
    "communication": resources.COMMUNICATION,
    "interpretability": corpus.INTERPRETABILITY,
    "corpus": corpus.CORPUS,
    "recall": synthetic.RECALL,
    "distance": synthetic.DISTANCE,
}

_FORMAT = 2
"""Of the results of a measurement; others are refused."""


def run(out: Path, quick: bool, names: Sequence[str]) -> None:
    """Measure; write results.json, table.md and the pictures after each measurement.

    Other measurements are taken from the present results.json.

    Args:
      out: an existing folder.
      quick: small sizes.
      names: of `MEASUREMENTS`.

    Raises:
      UserError: the present results.json is not one of this benchmark.
    """
    path = out / "results.json"
    results = _read(path)
    for name in names:
        measurement = MEASUREMENTS[name]
        print(f"measuring {name} ...", flush=True)
        start = time.perf_counter()
        measured = measurement.measure(**(measurement.quick if quick else measurement.full))
        results[name] = {
            "format": _FORMAT,
            "measured": measured,
            "quick": quick,
            "seconds": time.perf_counter() - start,
            "machine": machine.describe(),
        }
        write_file(str(path), (json.dumps(results, indent=2) + "\n").encode("utf-8"))
        first = report.write(out, _read(path), MEASUREMENTS)
    print(f"{first}\nwritten: {out / 'table.md'}, its pictures, and results.json")


def _read(path: Path) -> dict[str, Any]:
    """Earlier results, in the order of `MEASUREMENTS`."""
    if not path.exists():
        return {}
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); remove it, or name another --out") from error
    is_whole = isinstance(results, dict) and all(
        isinstance(results[name], dict) and results[name].get("format") == _FORMAT
        for name in MEASUREMENTS
        if name in results
    )
    if not is_whole:
        raise UserError(f"{path}: not results of this benchmark; remove it, or name another --out")
    return {name: results[name] for name in MEASUREMENTS if name in results}
