"""Startup time: imports, and the first train step of `base`.

Everything runs in fresh, alternating processes. The compilation cache is the one of the scripts, in
a temporary folder; ``cold`` finds it empty, ``warm`` finds the entries of the cold run.
"""

import functools
import gc
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from simplernn_jax.cli.compilation_cache import use_compilation_cache

from . import measure
from .measure import Call, Effort, alternate, call_isolated, median
from .tables import Row, Table
from .train_steps import load_config, our_step

PACKAGES = "jax, flax, optax"
_PUBLIC = "simplernn_jax.ops, simplernn_jax.models, simplernn_jax.inference"
IMPORTS = {
    PACKAGES: PACKAGES,
    "and simplernn_jax": f"{PACKAGES}, simplernn_jax",
    "and its public modules": f"{PACKAGES}, {_PUBLIC}",
    "and all of scripts/train.py": f"{PACKAGES}, simplernn_jax.training.loop",
}
"""Imports of a process, by its name in the table."""


def run(effort: Effort) -> Iterator[Table]:
    """Tables of both; `effort.calls` is unused, since a process starts once."""
    yield Table("startup: fresh processes that import", compare_imports(effort.blocks))
    title = "startup: first step of base after imports, by compilation cache"
    yield Table(title, compare_first_steps(effort.blocks))


def compare_imports(blocks: int) -> list[Row]:
    """Median wall time of processes that only import, and median of the difference to the first."""
    calls: dict[str, Call] = {
        name: functools.partial(
            subprocess.check_call,
            [sys.executable, "-c", f"import {packages}"],
            cwd=measure.PACKAGES,
        )
        for name, packages in IMPORTS.items()
    }
    # The first calls compile to byte code and fill the page cache.
    times = alternate(calls, Effort(blocks, 1))
    rows: list[Row] = []
    for name, each in times.items():
        over = statistics.median(a - b for (a,), (b,) in zip(each, times[PACKAGES], strict=True))
        rows.append({"import": name, "seconds": median(each), "over the first": over})
    return rows


def compare_first_steps(blocks: int) -> list[Row]:
    """Median seconds of the first train step with an empty and a filled cache, and of the ratio."""
    pairs = []
    for _ in range(blocks):
        with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
            environment = {"JAX_COMPILATION_CACHE_DIR": folder}
            pairs.append([call_isolated(seconds_of_first_step, environment) for _ in range(2)])
            if not any(Path(folder).iterdir()):
                raise RuntimeError("nothing was written to the compilation cache")
    cold, warm = zip(*pairs, strict=True)
    columns = {"cold": cold, "warm": warm, "warm / cold": [b / a for a, b in pairs]}
    return [{"cache": name, "seconds": statistics.median(x)} for name, x in columns.items()]


def seconds_of_first_step() -> float:
    """Seconds until the first step of `base` is taken; for `call_isolated`."""

    def first_step() -> Any:
        step = our_step(load_config("base", 16, 256))  # compiles
        return step()

    use_compilation_cache()
    gc.freeze()  # as scripts/train.py does
    return measure.seconds_of(first_step)
