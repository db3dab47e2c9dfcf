"""Progress of an explanation as lines: one per stage, and the share done of a long one."""

import time
from collections.abc import Callable

Report = Callable[[str], None]
"""Takes one line for a person."""

SECONDS = 10.0
"""Between two lines about one stage."""


def begin_stage(report: Report, name: str, total: int = 0) -> Callable[[int], None]:
    """Report that a stage begins; call the result with how much of `total` is done.

    Args:
      report: takes the lines.
      name: what is done, such as ``reading the text``.
      total: of what is counted; 0 where nothing is.
    """
    report(f"{name} ...")
    newest = time.monotonic()

    def advance(done: int) -> None:
        nonlocal newest
        if total and time.monotonic() - newest >= SECONDS:
            newest = time.monotonic()
            report(f"{name}: {done / total:.0%}")

    return advance


def no_report(line: str) -> None:
    """Take a line and show it to nobody."""
    del line
