"""Coverage-guided fuzzing of everything that reads input.

A process of its own (`fuzz_target`) runs Atheris, which is libFuzzer for Python: it keeps each
input that reaches a new branch of this package, and mutates those it has kept.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from simplernn_jax.project import ROOT

from .experiment import Case, experiment

OUTCOMES = "outcomes.json"
"""File in which the process leaves the number of inputs by kind, and all failures."""
_SHOWN = 3000


@experiment(full=1_000_000, quick=8000, package="atheris")
def fuzz(folder: Path, count: int, seed: int) -> Iterator[Case]:
    """Any input to a reader of files, requests or arguments is accepted or rejected in time."""
    words = [sys.executable, "-m", f"{__package__}.fuzz_target", str(folder)]
    words += [str(number) for number in (count, seed, os.getpid())]
    path = os.pathsep.join([str(ROOT), *filter(os.path.isabs, sys.path)])
    environment = os.environ | {"PYTHONPATH": path, "PYTHONHASHSEED": "0"}
    log = folder / "log"
    with open(log, "wb") as file:
        process = subprocess.run(words, check=False, env=environment, stdout=file, stderr=file)
    outcomes: dict[str, Any] = {"kinds": {}, "failures": []}
    if (folder / OUTCOMES).exists():  # not after a signal
        outcomes = json.loads((folder / OUTCOMES).read_text())
    yield from (Case(*failure) for failure in outcomes["failures"])
    for kind, number in outcomes["kinds"].items():
        yield from [Case("an input", None, kind)] * number
    num_inputs = len(outcomes["failures"]) + sum(outcomes["kinds"].values())
    if process.returncode or num_inputs < count:
        end = log.read_bytes()[-_SHOWN:].decode(errors="replace")
        problem = f"ended the process with code {process.returncode}: {end}"
        yield Case(f"input {num_inputs + 1}", problem)
