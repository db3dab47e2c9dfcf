"""Startup time: the first train step of `base`, without and with a compilation cache.

Everything runs in fresh processes. The compilation cache is the one of the scripts, in a temporary
folder; ``cold`` finds it empty, ``warm`` finds the entries of the cold run.
"""

import gc
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from simplernn_jax.cli.compilation_cache import use_compilation_cache

from .measure import Effort, call_isolated, seconds_of
from .tables import Table
from .train_steps import load_config, our_step


def run(effort: Effort) -> Iterator[Table]:
    """Median seconds of the first step; `effort.calls` is unused, since a process starts once."""
    pairs = []
    for _ in range(effort.blocks):
        with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
            environment = {"JAX_COMPILATION_CACHE_DIR": folder}
            pairs.append([call_isolated(seconds_of_first_step, environment) for _ in range(2)])
            if not any(Path(folder).iterdir()):
                raise RuntimeError("nothing was written to the compilation cache")
    cold, warm = zip(*pairs, strict=True)
    columns = {"cold": cold, "warm": warm, "warm / cold": [b / a for a, b in pairs]}
    rows = [{"cache": name, "seconds": statistics.median(x)} for name, x in columns.items()]
    yield Table("startup: first step of base after imports, by compilation cache", rows)


def seconds_of_first_step() -> float:
    """Seconds until the first step of `base` is taken; for `call_isolated`."""

    def first_step() -> Any:
        step = our_step(load_config("base", 16, 256))  # compiles
        return step()

    use_compilation_cache()
    gc.freeze()  # as scripts/train.py does
    return seconds_of(first_step)
