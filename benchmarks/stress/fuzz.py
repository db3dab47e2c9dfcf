"""Mutated input to everything that reads input, guided by the branches that it reaches.

A process of its own (`fuzz_target`) runs Atheris, libFuzzer for Python: it keeps each input that
reaches a new branch of this package, and mutates those it has kept.
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from simplernn_jax.project import ROOT

from .experiment import Case

OUTCOMES = "outcomes.json"
"""File in which the process leaves the number of inputs by kind, and all failures."""
_SHOWN = 3000


class Reader(NamedTuple):
    """Something that reads input."""

    name: str
    examples: list[bytes]
    """Valid inputs."""
    read: Callable[[bytes], None]
    """Use the input; anything but a refusal is a defect, wrong results included."""


def fuzz(folder: Path, count: int, seed: int) -> Iterator[Case]:
    """Give mutated input to each of the readers."""
    if importlib.util.find_spec("atheris") is None:
        yield Case("no input", "needs atheris, which runs on Linux; pip install atheris")
        return
    words = [sys.executable, "-m", f"{__package__}.fuzz_target", str(folder), str(count), str(seed)]
    path = os.pathsep.join([str(ROOT), *filter(os.path.isabs, sys.path)])
    log = folder / "log"
    with open(log, "wb") as file:
        process = subprocess.run(
            words, check=False, env=os.environ | {"PYTHONPATH": path}, stdout=file, stderr=file
        )
    try:
        outcomes = json.loads((folder / OUTCOMES).read_text())
    except FileNotFoundError:  # a signal, or libFuzzer, which then leaves the input in a file
        end = log.read_bytes()[-_SHOWN:].decode(errors="replace")
        yield Case("an input", f"ended the process with code {process.returncode}: {end}")
        return
    for kind, number in outcomes["kinds"].items():
        yield from [Case("an input", None, kind)] * number
    for description, problem in outcomes["failures"]:
        yield Case(description, problem)
