"""Registry of experiments. Each draws cases from a seed, runs them, and checks one promise."""

import importlib.util
import inspect
import random
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from simplernn_jax.errors import UserError, counted

from ..tables import Row


class Case(NamedTuple):
    """One injected fault and its outcome."""

    description: str
    problem: str | None
    """None if the promise held."""
    kind: str = ""
    """Counted in the summary, such as ``inside a save``."""


Run = Callable[[Path, int, int], Iterable[Case]]
"""``(empty folder, number of cases, seed) -> cases``; there may be fewer cases."""


class Experiment(NamedTuple):
    """A promise, which is the first line of the docstring of `run`, and how to test it."""

    run: Run
    full: int
    """Cases of ``stress.py all``."""
    quick: int
    """Cases of ``stress.py quick``."""
    package: str = ""
    """Importable name of a package that training does not need."""


EXPERIMENTS: dict[str, Experiment] = {}


def experiment(full: int, quick: int, package: str = "") -> Callable[[Run], Run]:
    """Register a function under its name; the arguments are those of `Experiment`."""

    def register(run: Run) -> Run:
        EXPERIMENTS[run.__name__] = Experiment(run, full, quick, package)
        return run

    return register


def run_cases(
    run: Callable[[int, random.Random], Case], count: int, seed: int, workers: int = 1
) -> Iterator[Case]:
    """Run `count` cases, each with its number and random numbers of its own."""
    draws = (random.Random(f"{seed} {number}") for number in range(count))
    if workers == 1:
        yield from map(run, range(count), draws)
        return
    with ThreadPoolExecutor(workers) as pool:
        yield from pool.map(run, range(count), draws)


def check_packages(names: Iterable[str]) -> None:
    """Raise `UserError` if a package of one of the experiments is missing."""
    needed = {name: EXPERIMENTS[name].package for name in names if EXPERIMENTS[name].package}
    missing = [
        f"{name} needs {package}"
        for name, package in needed.items()
        if importlib.util.find_spec(package) is None
    ]
    if missing:
        raise UserError(
            f"{', '.join(missing)}; run: pip install -e '.[test]' (atheris exists for Linux on "
            "x86-64 only), or name other experiments"
        )


def run_experiment(name: str, folder: Path, count: int, seed: int) -> Row:
    """Run cases of an experiment in `folder`; print each failure as it comes, and a summary.

    An exception of the experiment itself is a failure, and the end of its cases. Returns a row of
    the table of outcomes.
    """
    start, failed, kinds = time.monotonic(), 0, Counter[str]()
    run = EXPERIMENTS[name].run
    folder.mkdir()
    for case in _all_cases(run(folder, count, seed)):
        kinds[case.kind] += 1
        if case.problem is not None:
            failed += 1
            print(f"{name}: {case.description}: {case.problem}", flush=True)
    seconds, cases = round(time.monotonic() - start), kinds.total()
    listed = ", ".join(f"{number:,} {kind}" for kind, number in sorted(kinds.items()) if kind)
    shown = f" ({listed})" if listed else ""
    print(f"{name}: {counted(cases, 'case')}, {failed} failed{shown}; {seconds} s", flush=True)
    promise = (inspect.getdoc(run) or "").partition("\n")[0].rstrip(".")
    row: Row = {"experiment": name, "promise": promise, "seed": seed, "cases": cases}
    return row | {"failed": failed, "kinds": listed, "s": seconds}


def _all_cases(cases: Iterable[Case]) -> Iterator[Case]:
    """Cases, with one that fails if there is none, or if an exception ends them."""
    found = False
    try:
        for case in cases:
            found = True
            yield case
        if not found:
            yield Case("no case", "the experiment did not run")
    except Exception:
        yield Case("the experiment", traceback.format_exc().strip())
