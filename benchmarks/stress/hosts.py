"""Runs of several processes, one of which is lost or cut off from the others."""

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from .experiment import Case
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
_KINDS = ("killed", "stopped", "cut off")
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
    all must end.
    """
    two, four = Variant("2 processes", size=2), Variant("4 processes", size=4)
    return disturb_runs(folder, count, seed, [two, two, two, four], _disturb)


def _disturb(run: Run) -> tuple[str, str | None, str]:
    size, kind = run.variant.size, _KINDS[run.number % len(_KINDS)]
    # The coordinator is in the first process, and cannot be cut off from itself.
    victim = run.draw.randrange(1 if kind == "cut off" else 0, size)
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
