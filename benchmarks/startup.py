"""Startup time: imports, and the first train step of `base`.

Everything runs in fresh, alternating processes. The compilation cache is the one of the scripts, in
a temporary folder; ``cold`` finds it empty, ``warm`` finds the entries of the cold run.
"""

import functools
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import tables
from benchmarks.measure import Call, Effort, alternate, call_isolated, run_python

IMPORTS = {
    "jax, flax, optax": "import jax, flax, optax",
    "and simplernn_jax": "import jax, flax, optax, simplernn_jax",
    "and its public modules": "import jax, flax, optax, simplernn_jax\n"
    "import simplernn_jax.ops, simplernn_jax.models, simplernn_jax.inference",
    "and all of scripts/train.py": "import jax, flax, optax, simplernn_jax.training.loop",
}
"""Code of a process, by its name in the table."""

BATCH, LENGTH = 16, 256


def run(effort: Effort) -> dict[str, Any]:
    """Measure and print; `effort.calls` is unused, since a process starts once."""
    imports = compare_imports(effort.blocks)
    first_steps = compare_first_steps(effort.blocks)
    tables.show("startup: fresh processes that import", imports)
    tables.show("startup: first step of base, by compilation cache", first_steps)
    return {"imports": imports, "first_step": first_steps}


def compare_imports(blocks: int) -> list[dict[str, Any]]:
    """Median wall time of processes that only import, start and end included.

    The last column is the median over blocks of the difference to the first row.
    """
    calls: dict[str, Call] = {
        name: functools.partial(run_python, code) for name, code in IMPORTS.items()
    }
    # The first calls compile to byte code and fill the page cache.
    times = alternate(calls, Effort(blocks, 1))
    seconds = {name: [block[0] for block in each] for name, each in times.items()}
    first = next(iter(seconds.values()))
    return [
        {
            "import": name,
            "seconds": statistics.median(values),
            "over the first": statistics.median(a - b for a, b in zip(values, first, strict=True)),
        }
        for name, values in seconds.items()
    ]


def compare_first_steps(blocks: int) -> list[dict[str, Any]]:
    """Median seconds of the first train step with an empty and with a filled compilation cache.

    The last row has the medians over blocks of the ratios.
    """
    found: dict[str, list[dict[str, float]]] = {"cold": [], "warm": []}
    for _ in range(blocks):
        with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
            for name, results in found.items():
                results.append(_time_first_step(folder))
                if not any(Path(folder).iterdir()):
                    raise RuntimeError(f"the {name} run wrote nothing to the compilation cache")
    pairs = list(zip(found["warm"], found["cold"], strict=True))
    found["warm / cold"] = [
        {kind: warm[kind] / cold[kind] for kind in warm} for warm, cold in pairs
    ]
    return [
        {"cache": name}
        | {kind: statistics.median(result[kind] for result in results) for kind in results[0]}
        for name, results in found.items()
    ]


def _time_first_step(cache: str) -> dict[str, float]:
    environment = {"JAX_COMPILATION_CACHE_DIR": cache}
    started = time.time()
    moments: dict[str, float] = call_isolated(take_first_step, environment)
    return {
        "from process start": moments["done"] - started,
        "after imports": moments["done"] - moments["imported"],
    }


def take_first_step() -> dict[str, float]:
    """Unix times after all imports and after the first step; for `call_isolated`."""
    import jax

    from benchmarks.train_steps import load_config, our_step
    from simplernn_jax.compilation_cache import use_compilation_cache

    imported = time.time()
    use_compilation_cache()
    step = our_step(load_config("base", BATCH, LENGTH))
    jax.block_until_ready(step())
    return {"imported": imported, "done": time.time()}
