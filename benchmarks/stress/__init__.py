"""An experiment draws cases from a seed, runs them, and checks one promise."""

import faulthandler
import random
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from simplernn_jax.errors import counted

from ..tables import Row

HANGS_AFTER = 300.0
"""Seconds of a case."""


class Case(NamedTuple):
    """One injected fault and its outcome."""

    description: str
    problem: str | None
    """None if the promise held."""
    kind: str = ""
    """Counted in the summary, such as ``inside a save``."""


class Experiment(NamedTuple):
    """A promise, which the docstring of `run` states, and how to test it."""

    run: Callable[[Path, int, int], Iterable[Case]]
    """``(empty folder, number of cases, seed) -> cases``; there may be fewer cases."""
    full: int
    """Cases of ``stress.py all``."""
    quick: int
    """Cases of ``stress.py quick``; 0 if a test covers it."""


def run_cases(
    run: Callable[[int, random.Random], Case], count: int, seed: int, workers: int = 1
) -> Iterator[Case]:
    """Run `count` cases, each with its number and its own random numbers.

    Of one worker, a case that hangs ends the process with its stacks.
    """
    draws = (random.Random(f"{seed} {number}") for number in range(count))
    if workers > 1:
        with ThreadPoolExecutor(workers) as pool:
            yield from pool.map(run, range(count), draws)
        return
    for number, draw in enumerate(draws):
        faulthandler.dump_traceback_later(HANGS_AFTER, exit=True)
        try:
            case = run(number, draw)
        finally:
            faulthandler.cancel_dump_traceback_later()
        yield case


def run_experiment(name: str, experiment: Experiment, folder: Path, count: int, seed: int) -> Row:
    """Run cases in `folder`; print each failure as it comes, and a summary.

    An exception of the experiment itself is a failure, and the end of its cases; no case at all is
    a failure too. Returns a row of the table of outcomes.
    """
    start, failed, kinds = time.monotonic(), 0, Counter[str]()
    folder.mkdir()

    def note(case: Case) -> None:
        nonlocal failed
        kinds[case.kind] += 1
        if case.problem is not None:
            failed += 1
            print(f"{name}: {case.description}: {case.problem}", flush=True)

    try:
        for case in experiment.run(folder, count, seed):
            note(case)
        if not kinds:
            note(Case("no case", "the experiment did not run"))
    except Exception:
        note(Case("the experiment", traceback.format_exc().strip()))
    seconds, cases = round(time.monotonic() - start), kinds.total()
    listed = ", ".join(f"{number:,} {kind}" for kind, number in sorted(kinds.items()) if kind)
    shown = f" ({listed})" if listed else ""
    print(f"{name}: {counted(cases, 'case')}, {failed} failed{shown}; {seconds} s", flush=True)
    row: Row = {"experiment": name, "seed": seed, "cases": cases, "failed": failed}
    return row | {"kinds": listed, "s": seconds}
