"""Cases of an experiment, and their summary."""

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple


class Case(NamedTuple):
    """One injected fault and what came of it."""

    description: str
    problem: str | None
    """What is wrong; None if the promise held."""
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
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.kinds.items()) if kind)
        return (
            f"{self.name}: {self.cases} cases, {len(self.failures)} failed"
            + (f" ({kinds})" if kinds else "")
            + f"; {self.seconds:.0f} s"
        )


def run_experiment(
    name: str, experiment: Experiment, folder: Path, count: int, seed: int
) -> Summary:
    """Run cases of an experiment; print each failure as it comes, and the summary."""
    start = time.monotonic()
    summary = Summary(name, 0, [], Counter(), 0.0)
    folder.mkdir()
    for case in experiment.run(folder, count, seed):
        summary.cases += 1
        summary.kinds[case.kind] += 1
        if case.problem is not None:
            summary.failures.append(case)
            print(f"{name}: {case.description}: {case.problem}", flush=True)
    if not summary.cases:
        summary.failures.append(Case("no case", "the experiment did not run"))
    summary.seconds = time.monotonic() - start
    print(summary.line(), flush=True)
    return summary


def table(summaries: list[Summary], experiments: dict[str, Experiment], seed: int) -> str:
    """Format a Markdown table of the outcomes."""
    lines = [f"Seed {seed}.", "", "| experiment | promise | cases | failed | s |"]
    lines.append("|---|---|---:|---:|---:|")
    lines += [
        f"| `{s.name}` | {experiments[s.name].promise} | {s.cases:,} | {len(s.failures)} "
        f"| {s.seconds:.0f} |"
        for s in summaries
    ]
    return "\n".join(lines) + "\n"
