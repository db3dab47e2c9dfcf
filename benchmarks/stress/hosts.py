"""Runs of several processes, one of which is lost, cut off, slow, or has a wrong clock."""

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from . import preload
from .experiment import Case
from .network import Proxy
from .runs import (
    PARALLEL,
    exit_code,
    log_of,
    read_checkpoint,
    resume,
    send,
    start_run,
    train,
    wait_for_a_moment,
)

_ENDS_WITHIN = 60.0
"""Seconds in which the other processes must end."""
_REASONS = {76: "error: a peer process failed", 2: "error: not all processes"}
"""Exit codes of the other processes, and the reason in their log."""
_LOSSES = ("killed", "stopped", "cut off")
_KINDS = (*_LOSSES, "slow disk", "wrong clock")
_ALL = 10**9
_DELAY = 20_000
"""Microseconds that a call takes which writes to a slow disk."""
_SHIFT = 40 * 86_400
_WRONG_CLOCK = """\
import time

now, now_ns = time.time, time.time_ns
time.time = lambda: now() + {shift}
time.time_ns = lambda: now_ns() + {shift} * 10**9
with open({record!r}, "wb") as file:
    file.write(b"1")
"""
"""Clock of Python; the C++ of XLA waits by that of the system, which all processes share here."""


def hosts(folder: Path, count: int, seed: int) -> Iterator[Case]:
    """Disturb one of two processes, in every fourth case one of four.

    A stopped process is alive and hangs. One that is cut off from the coordinator still exchanges
    gradients with the others, so all must end. Slow disks and wrong clocks must change nothing.
    """
    library = preload.build("failing_writes", folder)
    expected = {}
    for size in (2, 4) if count > 3 else (2,):
        train(folder / f"alone{size}", size)
        expected[size] = read_checkpoint(folder / f"alone{size}")

    def run_case(number: int) -> Case:
        size = 4 if number % 4 == 3 else 2
        workdir = folder / str(number)
        draw = random.Random(f"{seed} {number}")
        kind = _KINDS[number % len(_KINDS)]
        if kind in _LOSSES:
            what, problem = _lose(workdir, size, draw, kind)
            problem = problem or resume(workdir, expected[size], size)
        else:
            what, problem = _disturb(workdir, size, draw, kind, library, expected[size])
        shutil.rmtree(workdir, ignore_errors=True)  # it may have failed before it made one
        return Case(f"run {number}, {size} processes, {what}", problem, kind)

    with ThreadPoolExecutor(PARALLEL) as pool:
        yield from pool.map(run_case, range(count))


def _disturb(
    workdir: Path,
    size: int,
    draw: random.Random,
    kind: str,
    library: Path,
    expected: dict[str, Any],
) -> tuple[str, str | None]:
    """Run to the end with a process that is slow or wrong."""
    victim = draw.randrange(size)
    record = workdir.with_suffix(".record")
    if kind == "slow disk":
        variables = preload.failing_writes(library, record, workdir, 1, _ALL, -_DELAY)
    else:
        path = workdir.with_suffix(".clock")
        path.mkdir()
        shift = draw.choice([-_SHIFT, _SHIFT])
        program = _WRONG_CLOCK.format(shift=shift, record=str(record))
        (path / "sitecustomize.py").write_text(program, "utf-8")
        variables = {"PYTHONPATH": os.pathsep.join([str(path), *filter(os.path.isabs, sys.path)])}
    problem = resume(workdir, expected, size, of_process={victim: variables})
    if problem is None and not (record.exists() and preload.read_calls(record)[0]):
        problem = "nothing was disturbed"
    return f"{kind} of process {victim}", problem


def _lose(workdir: Path, size: int, draw: random.Random, kind: str) -> tuple[str, str | None]:
    """Kill, stop or cut off one process, and wait for those that must end."""
    # The coordinator is in the first process, and cannot be cut off from itself.
    victim = draw.randrange(1 if kind == "cut off" else 0, size)
    with (
        Proxy() as proxy,
        start_run(workdir, size, proxies={victim: proxy} if victim else None) as processes,
    ):
        when = wait_for_a_moment(workdir, processes, draw)
        codes = [process.poll() for process in processes]
        if any(codes):
            return f"nothing {when}", f"ended before with codes {codes}: {log_of(workdir)[-500:]}"
        if kind == "cut off":
            proxy.cut()
        else:
            send(processes[victim], signal.SIGKILL if kind == "killed" else signal.SIGSTOP)
        started = time.monotonic()
        others = [p for i, p in enumerate(processes) if i != victim or kind == "cut off"]
        codes = [exit_code(p, started + _ENDS_WITHIN - time.monotonic()) for p in others]
    what = f"process {victim} {kind} {when}, the others waited {time.monotonic() - started:.1f} s"
    if None in codes:
        return what, f"not ended within {_ENDS_WITHIN:.0f} s, codes {codes}"
    # Without a reason, it may have ended regularly before.
    log = log_of(workdir)
    if any(code and _REASONS.get(code, "no reason") not in log for code in codes):
        return what, f"codes {codes} without their reason: {log[-500:]}"
    return what, None
