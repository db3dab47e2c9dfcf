"""Time before the first useful thing happens: imports, and the first train step of `base`.

Everything runs in fresh processes that take turns. The compilation cache is the one that the
scripts use, in a temporary folder; ``cold`` finds it empty, ``warm`` as a cold run left it.
"""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import tables
from benchmarks.interleave import Effort
from benchmarks.isolated import call_isolated, run_python

IMPORTS = {
    "jax, flax, optax": "import jax, flax, optax",
    "and simplernn_jax": "import jax, flax, optax, simplernn_jax",
    "and its public modules": "import jax, flax, optax, simplernn_jax\n"
    "import simplernn_jax.ops, simplernn_jax.models, simplernn_jax.inference",
    "and what scripts/train.py needs": "import jax, flax, optax, simplernn_jax.training.loop",
}
"""Code of a process, by what it imports; what the others cost is over the first."""

BATCH, LENGTH = 16, 256


def run(effort: Effort) -> dict[str, Any]:
    """Measures and prints everything; `effort.calls` is not used, a process starts once."""
    imports = compare_imports(effort.blocks)
    first_steps = compare_first_steps(effort.blocks)
    _show(imports, first_steps)
    return {"imports": imports, "first_step": first_steps}


def compare_imports(blocks: int) -> dict[str, dict[str, float]]:
    """Wall time of processes that only import, start and end included.

    Returns:
      By what is imported: median seconds, and seconds over those of the first in the same block.
    """
    for code in IMPORTS.values():
        run_python(code)  # writes the byte code, reads the files from the disk
    seconds: dict[str, list[float]] = {name: [] for name in IMPORTS}
    for _ in range(blocks):
        for name, code in IMPORTS.items():
            start = time.perf_counter()
            run_python(code)
            seconds[name].append(time.perf_counter() - start)
    first = next(iter(seconds.values()))
    return {
        name: {
            "seconds": statistics.median(values),
            "over_first": statistics.median(a - b for a, b in zip(values, first, strict=True)),
        }
        for name, values in seconds.items()
    }


def compare_first_steps(blocks: int) -> dict[str, dict[str, float]]:
    """The first train step with an empty and with a filled compilation cache.

    Returns:
      By cache: median seconds ``from_start`` of the process, and ``after_imports``; under
      ``warm_to_cold`` the medians over blocks of the ratios of both.
    """
    found: dict[str, list[dict[str, float]]] = {"cold": [], "warm": []}
    for _ in range(blocks):
        with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
            for name, results in found.items():
                results.append(_time_first_step(folder))
                if not any(Path(folder).iterdir()):
                    raise RuntimeError(f"the {name} run left nothing in the compilation cache")
    kinds = ("from_start", "after_imports")
    return {
        **{
            name: {kind: statistics.median(result[kind] for result in results) for kind in kinds}
            for name, results in found.items()
        },
        "warm_to_cold": {
            kind: statistics.median(
                warm[kind] / cold[kind]
                for warm, cold in zip(found["warm"], found["cold"], strict=True)
            )
            for kind in kinds
        },
    }


def _time_first_step(cache: str) -> dict[str, float]:
    environment = {"JAX_COMPILATION_CACHE_DIR": cache}
    started = time.time()
    moments: dict[str, float] = call_isolated(take_first_step, environment)
    return {
        "from_start": moments["done"] - started,
        "after_imports": moments["done"] - moments["imported"],
    }


def take_first_step() -> dict[str, float]:
    """Seconds since 1970 when everything was imported and when the first step was done."""
    import jax

    from benchmarks.jax_steps import load_config, our_step
    from simplernn_jax.compilation_cache import use_compilation_cache

    imported = time.time()
    use_compilation_cache()
    step = our_step(load_config("base", BATCH, LENGTH))
    jax.block_until_ready(step())
    return {"imported": imported, "done": time.time()}


def _show(imports: dict[str, dict[str, float]], first_steps: dict[str, dict[str, float]]) -> None:
    rows = [
        [
            f"import {name}",
            tables.number(values["seconds"], 2),
            tables.number(values["over_first"], 3) if values["over_first"] else "",
            "",
            "",
        ]
        for name, values in imports.items()
    ]
    for name in ("cold", "warm"):
        values, relative = first_steps[name], first_steps["warm_to_cold"]
        cells = [f"first step of base, {name} cache", tables.number(values["from_start"], 2), ""]
        cells.append(tables.number(values["after_imports"], 2))
        is_warm = name == "warm"
        cells.append(
            f"{relative['from_start']:.2f}, {relative['after_imports']:.2f}" if is_warm else ""
        )
        rows.append(cells)
    headings = ["what", "seconds", "over the first", "after imports", "warm / cold of both"]
    tables.show("startup: processes of their own", headings, rows)
