"""Kills one of two processes that train together; part of `stress`."""

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

from simplernn_jax.checkpoint.folder import CheckpointFolder
from stress_runs import SAVE_EVERY, STEPS, compare, final_checkpoint, start

_COUNT, _DEVICES = 2, 2
_START_SECONDS, _SAVE_SECONDS = 8.0, 0.5
"""What a start, and three steps and a save, take about."""
_ENDS_WITHIN = 60.0
"""Seconds in which the other process must end."""
_JOIN_SECONDS = 30


def kill_processes(folder: Path, count: int, seed: int) -> int:
    """Kills and resumes `count` runs; 1 if one ends otherwise than a run left alone."""
    _train(folder, folder / "alone")
    expected = final_checkpoint(folder / "alone")
    wrong = 0
    for number in range(count):
        draw = random.Random(f"{seed} {number}")
        what, problem = _kill_and_resume(folder, number, draw, expected)
        wrong += problem is not None
        print(f"run {number}: {what}: {problem or 'same bytes'}", flush=True)
    print(f"killed a process of {count} runs: {count - wrong} identical, {wrong} wrong")
    return int(wrong > 0)


def _kill_and_resume(
    folder: Path, number: int, draw: random.Random, expected: dict[str, Any]
) -> tuple[str, str | None]:
    """What was done, and what was wrong, if anything."""
    workdir = folder / f"run{number}"
    processes = _start(folder, workdir)
    victim = draw.randrange(_COUNT)
    # Some hang: they are alive and do nothing.
    sent = draw.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP])
    try:
        when = _wait_for_a_moment(workdir, processes, draw)
        for process_id in _family(processes[victim].pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process_id, sent)
        started = time.monotonic()
        problem = _wait_for_the_others(folder, workdir, processes, victim)
        took = time.monotonic() - started
    finally:
        _kill(processes)
    what = f"{sent.name} to process {victim} {when}, the other ended {took:.1f} s later"
    if problem is None:
        _train(folder, workdir)
        problem = compare(final_checkpoint(workdir), expected)
    if (workdir / "checkpoints_damaged").exists():
        problem = "a checkpoint was taken for damaged"
    shutil.rmtree(workdir)
    return what, problem


def _wait_for_a_moment(
    workdir: Path, processes: list[subprocess.Popen[bytes]], draw: random.Random
) -> str:
    """Waits until a random moment of the start, or after a random save; says which."""
    saves = draw.randrange(STEPS // SAVE_EVERY)
    if not saves:
        seconds = draw.uniform(0, _START_SECONDS)
        time.sleep(seconds)
        return f"{seconds:.1f} s after its start"
    checkpoints = CheckpointFolder(str(workdir))
    while max(checkpoints.steps(), default=0) < saves * SAVE_EVERY:
        if any(process.poll() is not None for process in processes):
            break
        time.sleep(0.01)
    time.sleep(draw.uniform(0, _SAVE_SECONDS))
    return f"after the save of step {saves * SAVE_EVERY}"


def _wait_for_the_others(
    folder: Path, workdir: Path, processes: list[subprocess.Popen[bytes]], victim: int
) -> str | None:
    """What is wrong with how they end, if anything."""
    deadline = time.monotonic() + _ENDS_WITHIN
    for number, process in enumerate(processes):
        if number == victim:
            continue
        try:
            code = process.wait(deadline - time.monotonic())
        except subprocess.TimeoutExpired:
            return f"process {number} has not ended within {_ENDS_WITHIN:.0f} s"
        log = _log(folder, workdir, number)
        # Without a line it may only have ended well, before the other was killed.
        said = {76: "error: another process of the run was lost", 2: "error: not all processes"}
        if code != 0 and (code not in said or said[code] not in log):
            return f"process {number} ended with code {code} and did not say why"
    return None


def _start(folder: Path, workdir: Path) -> list[subprocess.Popen[bytes]]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    return [
        start(
            folder,
            workdir,
            "--distributed",
            f"--coordinator=127.0.0.1:{port}",
            f"--num_processes={_COUNT}",
            f"--process_id={number}",
            f"--join_timeout={_JOIN_SECONDS}",
            log=_log_name(workdir, number),
            devices=_DEVICES,
        )
        for number in range(_COUNT)
    ]


def _family(process_id: int) -> list[int]:
    """The process and its children, of which one trains (`supervisor.supervise`)."""
    lines = subprocess.check_output(["ps", "-A", "-o", "ppid=,pid="], text=True).splitlines()
    pairs = [tuple(map(int, line.split())) for line in lines]
    return [process_id, *(child for parent, child in pairs if parent == process_id)]


def _train(folder: Path, workdir: Path) -> None:
    processes = _start(folder, workdir)
    try:
        codes = [process.wait() for process in processes]
    finally:
        _kill(processes)
    if any(codes):
        logs = "\n".join(_log(folder, workdir, number) for number in range(_COUNT))
        raise RuntimeError(f"the training run in {workdir} failed with codes {codes}:\n{logs}")


def _kill(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.kill()  # which ends its child too
        process.wait()


def _log(folder: Path, workdir: Path, number: int) -> str:
    return (folder / _log_name(workdir, number)).read_text(encoding="utf-8", errors="replace")


def _log_name(workdir: Path, number: int) -> str:
    return f"{workdir.name}-{number}.log"
