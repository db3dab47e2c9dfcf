"""Experiments of ``scripts/stress.py``: killed runs, damaged checkpoints, lost processes."""

import concurrent.futures
import contextlib
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from benchmarks.stress_runs import (
    SAVE_EVERY,
    STEPS,
    Process,
    comparable,
    compare,
    contents,
    kill,
    newest_checkpoint,
    read_log,
    start,
    train,
)
from simplernn_jax.checkpoint import manifest
from simplernn_jax.checkpoint.checkpointer import Checkpointer, read_config
from simplernn_jax.checkpoint.contents import saved_leaves
from simplernn_jax.checkpoint.folder import UNFINISHED_MARK, CheckpointFolder

_PARALLEL = 2
"""Simultaneous runs: most of a short run is its start, which keeps one core busy."""
_START_SECONDS, _SAVE_SECONDS = 8.0, 0.5
"""Approximate time of a start, and of three steps and a save."""
_ENDS_WITHIN = 60.0
"""Seconds in which the other process must end."""
_REASONS = {76: "error: another process of the run was lost", 2: "error: not all processes"}
"""Exit codes of the other process, and the reason in its log."""

Interruption = Callable[[Path, list[Process], random.Random, int], tuple[str, str | None]]
"""``(workdir, processes, draw, number of the run) -> (description, problem)``."""


def kill_runs(folder: Path, count: int, seed: int) -> int:
    """Kill and resume `count` runs; 1 if one does not end as an uninterrupted run."""
    started = time.monotonic()
    train(folder / "alone")
    seconds = time.monotonic() - started

    def interrupt(
        workdir: Path, processes: list[Process], draw: random.Random, number: int
    ) -> tuple[str, str | None]:
        if number % 2 == 0:
            _stop_inside_a_save(processes[0], workdir / "checkpoints", draw)
        else:
            with contextlib.suppress(subprocess.TimeoutExpired):
                processes[0].wait(draw.uniform(0, seconds))
        kill(processes)
        saving = _is_saving(workdir / "checkpoints")
        return "killed inside a save" if saving else "killed between saves", None

    results = _interrupt_runs(folder, count, seed, interrupt, num_processes=1)
    inside = sum("inside" in what for what, _ in results)
    wrong = sum(problem is not None for _, problem in results)
    print(f"killed {count} runs, {inside} inside a save: {count - wrong} identical, {wrong} wrong")
    return int(wrong > 0 or 2 * inside < count)


def lose_processes(folder: Path, count: int, seed: int) -> int:
    """Kill or stop one of two processes of `count` runs, and resume; 1 as for `kill_runs`."""
    train(folder / "alone", num_processes=2)
    results = _interrupt_runs(folder, count, seed, _lose_a_process, num_processes=2)
    wrong = sum(problem is not None for _, problem in results)
    print(f"killed a process of {count} runs: {count - wrong} identical, {wrong} wrong")
    return int(wrong > 0)


def damage_checkpoints(folder: Path, count: int, seed: int) -> int:
    """Damage the newest checkpoint `count` times; 1 if one was missed or not recovered from."""
    draw = random.Random(seed)
    whole = folder / "whole"
    train(whole)
    before, newest = CheckpointFolder(str(whole)).steps()[-2:]
    expected = contents(whole, before)
    config, tokenizer_json, _ = read_config(str(whole))
    detected = recovered = 0
    for number in range(count):
        workdir = folder / "damaged"
        shutil.copytree(whole / "checkpoints", workdir / "checkpoints")
        what = _damage(workdir / "checkpoints" / str(newest), draw)
        checkpointer = Checkpointer(str(workdir), config, tokenizer_json, keep_last=2, keep_best=0)
        with contextlib.closing(checkpointer):
            difference = _restore(checkpointer, workdir, expected)
        noticed = (workdir / "checkpoints_damaged" / str(newest)).is_dir()
        detected += noticed
        recovered += difference is None
        if not noticed or difference:
            print(f"damage {number}: {what}: {'' if noticed else 'not detected, '}{difference}")
        shutil.rmtree(workdir)
    print(f"{count} damages: {detected} detected, {recovered} recovered")
    return int(detected < count or recovered < count)


EXPERIMENTS = {"kill": kill_runs, "damage": damage_checkpoints, "hosts": lose_processes}


def _interrupt_runs(
    folder: Path, count: int, seed: int, interrupt: Interruption, num_processes: int
) -> list[tuple[str, str | None]]:
    """Description and problem of every run, which is interrupted, resumed and compared."""
    expected = newest_checkpoint(folder / "alone")

    def interrupt_and_resume(number: int) -> tuple[str, str | None]:
        workdir = folder / f"run{number}"
        draw = random.Random(f"{seed} {number}")
        processes = start(workdir, num_processes)
        try:
            what, problem = interrupt(workdir, processes, draw, number)
        finally:
            kill(processes)
        if problem is None:
            train(workdir, num_processes)
            problem = compare(newest_checkpoint(workdir), expected)
        if (workdir / "checkpoints_damaged").exists():
            problem = "a checkpoint was taken for damaged"
        shutil.rmtree(workdir)
        return what, problem

    results = []
    with concurrent.futures.ThreadPoolExecutor(_PARALLEL // num_processes) as pool:
        for number, (what, problem) in enumerate(pool.map(interrupt_and_resume, range(count))):
            results.append((what, problem))
            print(f"run {number}: {what}: {problem or 'same bytes'}", flush=True)
    return results


def _stop_inside_a_save(process: Process, checkpoints: Path, draw: random.Random) -> None:
    """Stop the process at a random moment of a random save; return also if it ends before."""
    saves_to_pass = draw.randrange(STEPS // SAVE_EVERY - 1)
    was_saving = False
    while process.poll() is None:
        saving = _is_saving(checkpoints)
        if saving and not was_saving:
            saves_to_pass -= 1
        was_saving = saving
        if saving and saves_to_pass < 0:
            time.sleep(draw.uniform(0, 0.05))
            process.send_signal(signal.SIGSTOP)
            if _is_saving(checkpoints):
                return
            process.send_signal(signal.SIGCONT)
            was_saving = False
        time.sleep(0.001)


def _is_saving(checkpoints: Path) -> bool:
    """Whether there is an incomplete checkpoint."""
    try:
        names = os.listdir(checkpoints)
    except FileNotFoundError:
        return False
    return any(
        UNFINISHED_MARK in name
        or (name.isdecimal() and not manifest.has_manifest(str(checkpoints / name)))
        for name in names
    )


def _lose_a_process(
    workdir: Path, processes: list[Process], draw: random.Random, number: int
) -> tuple[str, str | None]:
    """Kill or stop one process, and wait for the other."""
    del number
    victim = draw.randrange(len(processes))
    # A stopped process is alive and hangs.
    sent = draw.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP])
    when = _wait_for_a_moment(workdir, processes, draw)
    for process_id in _with_children(processes[victim].pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process_id, sent)
    started = time.monotonic()
    other = 1 - victim
    problem = None
    try:
        code = processes[other].wait(_ENDS_WITHIN)
    except subprocess.TimeoutExpired:
        problem = f"process {other} has not ended within {_ENDS_WITHIN:.0f} s"
    else:
        # Without a reason, it may have ended regularly before the signal was sent.
        if code != 0 and (code not in _REASONS or _REASONS[code] not in read_log(workdir)):
            problem = f"process {other} ended with code {code} and without its reason"
    took = time.monotonic() - started
    return f"{sent.name} to process {victim} {when}, the other ended {took:.1f} s later", problem


def _wait_for_a_moment(workdir: Path, processes: list[Process], draw: random.Random) -> str:
    """Wait until a random moment of the start, or after a random save; describe it."""
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


def _with_children(process_id: int) -> list[int]:
    """The process and its children, one of which trains (`supervisor.supervise`)."""
    lines = subprocess.check_output(["ps", "-A", "-o", "ppid=,pid="], text=True).splitlines()
    pairs = [tuple(map(int, line.split())) for line in lines]
    return [process_id, *(child for parent, child in pairs if parent == process_id)]


def _damage(step_path: Path, draw: random.Random) -> str:
    """Damage a random file; return a description."""
    file = draw.choice(sorted(path for path in step_path.rglob("*") if path.is_file()))
    content = bytearray(file.read_bytes())
    kind = draw.choice(["flip", "truncate", "delete"]) if content else "delete"
    position = draw.randrange(len(content)) if content else 0
    if kind == "delete":
        file.unlink()
    elif kind == "truncate":
        file.write_bytes(content[:position])
    else:
        content[position] ^= 1 << draw.randrange(8)
        file.write_bytes(content)
    return f"{kind} {file.relative_to(step_path)} at {position}"


def _restore(checkpointer: Checkpointer, workdir: Path, expected: dict[str, Any]) -> str | None:
    """Restore from `workdir`; return the difference to `expected`, if any."""
    path = CheckpointFolder(str(workdir)).step_path(expected["number of steps"])
    shapes = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        for name, leaf in saved_leaves(path).items()
    }
    restored = checkpointer.restore(shapes)
    if restored is None:
        return "nothing was restored"
    return compare(comparable(restored.step, restored.data_state, restored.state), expected)
