"""Runs of several processes, one of which is lost, cut off, slow, or has a wrong clock."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from .experiment import Case
from .faults import ALL, DELAY, Faults
from .runs import (
    Process,
    Run,
    Variant,
    disturb_runs,
    exit_code,
    free_port,
    log_of,
    send,
    wait_for_a_moment,
)

_ENDS_WITHIN = 60.0
"""Seconds in which the other processes must end."""
_REASONS = {76: "error: a peer process failed", 2: "error: not all processes"}
"""Exit codes of the other processes, and the reason in their log."""
_KINDS = ("killed", "stopped", "cut off", "slow disk", "wrong clock")
_SLOW_CALL = 20_000
"""Microseconds that a call takes which writes to a slow disk."""
_SHIFT = 40 * 86_400
_SHIFTED = "the clock is shifted"
_WRONG_CLOCK = f"""
import sys, time
now, now_ns = time.time, time.time_ns
time.time = lambda: now() + {{shift}}
time.time_ns = lambda: now_ns() + {{shift}} * 10**9
print("{_SHIFTED}", file=sys.stderr)
"""
"""Clock of Python; the C++ of XLA waits by that of the system, which all processes share here."""
_FORWARD = """
import asyncio, sys

async def pump(reader, writer):
    while data := await reader.read(1 << 16):
        writer.write(data)
        await writer.drain()

async def connect(reader, writer):
    try:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", int(sys.argv[2]))
        await asyncio.wait([
            asyncio.create_task(pump(*each))
            for each in ((reader, far_writer), (far_reader, writer))
        ], return_when=asyncio.FIRST_COMPLETED)
        far_writer.close()
    finally:  # also if nobody listens yet
        writer.close()

async def main():
    await (await asyncio.start_server(connect, "127.0.0.1", int(sys.argv[1]))).serve_forever()

asyncio.run(main())
"""


def hosts(folder: Path, count: int, seed: int) -> Iterator[Case]:
    """When a process is lost or cut off the others exit, and all resume to the same bytes.

    It is one of two processes, in every fourth case one of four. A stopped process is alive and
    hangs. One that is cut off from the coordinator still exchanges gradients with the others, so
    all must end. Slow disks and wrong clocks must change nothing.
    """
    faults = Faults(folder)
    two, four = Variant("2 processes", size=2), Variant("4 processes", size=4)
    variants = [two, two, two, four]
    return disturb_runs(folder, count, seed, variants, lambda run: _disturb(faults, run))


def _disturb(faults: Faults, run: Run) -> tuple[str, str | None, str]:
    size, kind = run.variant.size, _KINDS[run.number % len(_KINDS)]
    # The coordinator is in the first process, and cannot be cut off from itself.
    victim = run.draw.randrange(1 if kind == "cut off" else 0, size)
    if kind in ("slow disk", "wrong clock"):
        return f"{kind} of process {victim}", _slow_down(faults, run, victim, kind), kind
    ports = dict.fromkeys(range(size), free_port())
    with _forwarded(ports[0]) as (near, forwarder):
        ports |= {victim: near} if victim else {}
        with run.start({}, ports=ports) as processes:
            lost = forwarder if kind == "cut off" else processes[victim]
            others = [p for p in processes if p is not lost]
            when = wait_for_a_moment(run.workdir, processes, run.draw)
            codes = [process.poll() for process in processes]
            started = time.monotonic()
            problem = f"ended before with codes {codes}" if any(codes) else None
            if problem is None:
                send(lost, signal.SIGKILL if kind == "killed" else signal.SIGSTOP)
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


def _slow_down(faults: Faults, run: Run, victim: int, kind: str) -> str | None:
    """Run to the end with a process whose disk is slow or whose clock is wrong."""
    above = run.workdir.parent
    if kind == "slow disk":
        variables = faults.variables(above, 1, ALL, DELAY, _SLOW_CALL)
    else:
        shift = run.draw.choice([-_SHIFT, _SHIFT])
        clock = above / "clock"
        clock.mkdir()
        (clock / "sitecustomize.py").write_text(_WRONG_CLOCK.format(shift=shift), "utf-8")
        variables = {"PYTHONPATH": os.pathsep.join([str(clock), *filter(os.path.isabs, sys.path)])}
    with run.start({}, of_process={victim: variables}) as processes:
        codes = [process.wait() for process in processes]
    log = log_of(run.workdir)
    is_slow = kind == "slow disk" and faults.read_calls(above)[0] > 0
    if any(codes):
        return f"ended with codes {codes}: {log[-500:]}"
    return None if is_slow or _SHIFTED in log else "nothing was disturbed"


@contextlib.contextmanager
def _forwarded(target: int) -> Iterator[tuple[int, Process]]:
    """Start a process that forwards connections to `target`; yield its port, and the process.

    While it is stopped, nothing arrives, and no side is told, as when a cable is pulled.
    """
    port = free_port()
    words = [sys.executable, "-c", _FORWARD, str(port), str(target)]
    with subprocess.Popen(words, stderr=subprocess.DEVNULL, start_new_session=True) as process:
        try:
            yield port, process
        finally:
            process.kill()
