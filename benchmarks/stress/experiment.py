"""Cases of an experiment, and their summary."""

import dataclasses
import importlib.util
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from simplernn_jax.errors import UserError, counted


class Case(NamedTuple):
    """One injected fault and what came of it."""

    description: str
    problem: str | None
    """The fault; None if the promise held."""
    kind: str = ""
    """Counted in the summary, such as ``inside a save``."""


class Experiment(NamedTuple):
    """Cases of one promise."""

    promise: str
    """Row of the report, a noun phrase."""
    run: Callable[[Path, int, int], Iterator[Case]]
    """``(empty folder, number of cases, seed) -> cases``; it may stop early if there are fewer."""
    full: int
    """Cases of ``stress.py all``."""
    quick: int
    """Cases of ``stress.py quick``."""
    package: str = ""
    """Importable name of a package that is needed beyond those of training."""


@dataclasses.dataclass
class Summary:
    """Outcome of an experiment."""

    name: str
    cases: int
    failures: list[Case]
    kinds: Counter[str]
    seconds: float

    def line(self) -> str:
        """Summarize in one line."""
        kinds = self.kinds_line()
        return (
            f"{self.name}: {counted(self.cases, 'case')}, {len(self.failures)} failed"
            + (f" ({kinds})" if kinds else "")
            + f"; {self.seconds:.0f} s"
        )

    def kinds_line(self) -> str:
        """List the kinds with their numbers of cases."""
        return ", ".join(f"{count:,} {kind}" for kind, count in sorted(self.kinds.items()) if kind)


def check_packages(experiments: Mapping[str, Experiment]) -> None:
    """Raise `UserError` if a package of one of the experiments is missing."""
    missing = [
        f"{name} needs {experiment.package}"
        for name, experiment in experiments.items()
        if experiment.package and importlib.util.find_spec(experiment.package) is None
    ]
    if missing:
        raise UserError(
            f"{', '.join(missing)}; run: pip install -e '.[test]' (atheris exists for Linux on "
            "x86-64 only), or name other experiments"
        )


def run_experiment(
    name: str, experiment: Experiment, folder: Path, count: int, seed: int
) -> Summary:
    """Run cases of an experiment; print each failure as it comes, and the summary.

    An exception of the experiment itself is a failure, and the end of its cases.
    """
    start = time.monotonic()
    summary = Summary(name, 0, [], Counter(), 0.0)
    folder.mkdir()

    def fail(case: Case) -> None:
        summary.failures.append(case)
        print(f"{name}: {case.description}: {case.problem}", flush=True)

    try:
        for case in experiment.run(folder, count, seed):
            summary.cases += 1
            summary.kinds[case.kind] += 1
            if case.problem is not None:
                fail(case)
    except Exception:
        fail(Case("the experiment", traceback.format_exc().strip()))
    if not summary.cases:
        fail(Case("no case", "the experiment did not run"))
    summary.seconds = time.monotonic() - start
    print(summary.line(), flush=True)
    return summary


def table(summaries: list[Summary], experiments: dict[str, Experiment], seed: int) -> str:
    """Format a Markdown table of the outcomes."""
    lines = [f"Seed {seed}.", "", "| experiment | promise | cases | failed | kinds | s |"]
    lines.append("|---|---|---:|---:|---|---:|")
    lines += [
        f"| `{s.name}` | {experiments[s.name].promise} | {s.cases:,} | {len(s.failures)} "
        f"| {s.kinds_line()} | {s.seconds:.0f} |"
        for s in summaries
    ]
    return "\n".join(lines) + "\n"
