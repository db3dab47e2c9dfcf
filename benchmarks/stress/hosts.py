"""Runs of several processes, one of which is lost or hangs."""

import signal
import time
from collections.abc import Iterator
from pathlib import Path

from .experiment import Case
from .runs import Process, Run, Variant, disturb_runs, exit_code, log_of, send, wait_for_a_moment

_ENDS_WITHIN = 60.0
"""Seconds in which the other processes must end."""
_REASONS = {76: "error: a peer process failed", 2: "error: not all processes"}
"""Exit codes of the other processes, and the reason in their log."""
_KINDS = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}


def hosts(folder: Path, count: int, seed: int) -> Iterator[Case]:
    """When a process is lost the others exit with the reason, and all resume to the same bytes.

    It is one of two processes, in every fourth case one of four. A stopped process is alive and
    hangs, as one that is cut off.
    """
    two, four = Variant("2 processes", size=2), Variant("4 processes", size=4)
    return disturb_runs(folder, count, seed, [two, two, two, four], _disturb)


def _disturb(run: Run) -> tuple[str, str | None, str]:
    kind, victim = list(_KINDS)[run.number % 2], run.draw.randrange(run.variant.size)
    with run.start({}) as processes:
        when = wait_for_a_moment(run.workdir, processes, run.draw)
        codes = [process.poll() for process in processes]
        started = time.monotonic()
        problem = f"ended before with codes {codes}" if any(codes) else None
        if problem is None:
            send(processes[victim], _KINDS[kind])
            others = [process for process in processes if process is not processes[victim]]
            problem = _problem_of_others(run.workdir, others)
    seconds = time.monotonic() - started
    return f"process {victim} {kind} {when}, the others waited {seconds:.1f} s", problem, kind


def _problem_of_others(workdir: Path, others: list[Process]) -> str | None:
    """Wait for the processes that must end; say what is wrong with their ends."""
    until = time.monotonic() + _ENDS_WITHIN
    codes = [exit_code(process, until - time.monotonic()) for process in others]
    if None in codes:
        return f"not ended within {_ENDS_WITHIN:.0f} s, codes {codes}"
    # Without a reason, it may have ended regularly before.
    log = log_of(workdir)
    if any(code and _REASONS.get(code, "no reason") not in log for code in codes):
        return f"codes {codes} without their reason: {log[-500:]}"
    return None
