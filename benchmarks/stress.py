"""Experiments of ``scripts/stress.py``: killed runs, damaged checkpoints, lost processes."""

import concurrent.futures
import contextlib
import functools
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from simplernn_jax.checkpoint import manifest
from simplernn_jax.checkpoint.checkpointer import NEWEST, Checkpointer, read_config
from simplernn_jax.checkpoint.contents import read_arrays, read_json, saved_leaves
from simplernn_jax.checkpoint.folder import UNFINISHED_MARK, CheckpointFolder
from simplernn_jax.project import ROOT

STEPS, SAVE_EVERY = 24, 3
_PARALLEL = 2
"""Simultaneous processes: most of a short run is its start, which keeps one core busy."""
_START_SECONDS, _SAVE_SECONDS = 8.0, 0.5
"""Approximate time of a start, and of three steps and a save."""
_ENDS_WITHIN = 60.0
"""Seconds in which the other process must end."""
_REASONS = {76: "error: a peer process failed", 2: "error: not all processes"}
"""Exit codes of the other process, and the reason in its log."""

Process = subprocess.Popen[bytes]
Outcome = tuple[str, str | None]
"""Description of an interruption, and the problem."""
Interruption = Callable[[Path, list[Process], random.Random], Outcome]
"""Of the processes of the run in a workdir, at random."""


def interrupt_runs(folder: Path, count: int, interrupt: Interruption, num_processes: int) -> int:
    """Interrupt and resume `count` runs; 1 if one does not end as an uninterrupted run.

    The workdir of a run is named by its number, from which its moments follow.
    """
    _train(folder / "alone", num_processes)
    expected = read_checkpoint(folder / "alone")

    def interrupt_and_resume(number: int) -> Outcome:
        workdir = folder / str(number)
        with _run(workdir, num_processes) as processes:
            what, problem = interrupt(workdir, processes, random.Random(number))
        if problem is None:
            _train(workdir, num_processes)
            problem = _difference(read_checkpoint(workdir), expected)
        if (workdir / "checkpoints_damaged").exists():
            problem = "a checkpoint was taken for damaged"
        shutil.rmtree(workdir)
        print(f"run {number}: {what}: {problem or 'same bytes'}", flush=True)
        return what, problem

    with concurrent.futures.ThreadPoolExecutor(_PARALLEL // num_processes) as pool:
        outcomes = list(pool.map(interrupt_and_resume, range(count)))
    inside = sum("inside a save" in what for what, _ in outcomes)
    wrong = sum(problem is not None for _, problem in outcomes)
    print(f"killed {count} runs, {inside} inside a save: {count - wrong} identical, {wrong} wrong")
    return int(wrong > 0 or (num_processes == 1 and 2 * inside < count))


def damage_checkpoints(folder: Path, count: int) -> int:
    """Damage the newest checkpoint `count` times; 1 if one was missed or not recovered from."""
    draw = random.Random(0)
    whole, workdir = folder / "whole", folder / "damaged"
    _train(whole)
    before, newest = CheckpointFolder(str(whole)).steps()[-2:]
    leaves = saved_leaves(CheckpointFolder(str(whole)).step_path(before))
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in leaves.items()}
    expected = read_checkpoint(whole, before)
    config, tokenizer_json, _ = read_config(str(whole))
    detected = recovered = 0
    for number in range(count):
        shutil.copytree(whole / "checkpoints", workdir / "checkpoints")
        what = _damage(workdir / "checkpoints" / str(newest), draw)
        checkpointer = Checkpointer(str(workdir), config, tokenizer_json, keep_last=2, keep_best=0)
        with contextlib.closing(checkpointer):
            found = checkpointer.restore(shapes)
        restored = found and _comparable(found.step, found.data_state, found.state)
        problem = _difference(restored or {}, expected)
        noticed = (workdir / "checkpoints_damaged" / str(newest)).is_dir()
        detected, recovered = detected + noticed, recovered + (problem is None)
        if not noticed or problem:
            print(f"damage {number}: {what}: {'' if noticed else 'not detected, '}{problem}")
        shutil.rmtree(workdir)
    print(f"{count} damages: {detected} detected, {recovered} recovered")
    return int(detected < count or recovered < count)


def read_checkpoint(workdir: str | Path, checkpoint: int | str = NEWEST) -> dict[str, Any]:
    """Everything in a checkpoint, as values that ``==`` compares bit-exactly."""
    step = read_config(str(workdir), checkpoint)[2]
    path = CheckpointFolder(str(workdir)).step_path(step)
    return _comparable(step, read_json(path, "data"), read_arrays(path, list(saved_leaves(path))))


def _comparable(step: int, data_state: Any, arrays: dict[str, Any]) -> dict[str, Any]:
    values = {
        name: (str(array.dtype), array.shape, np.asarray(array).tobytes())
        for name, array in arrays.items()
    }
    return values | {"number of steps": step, "position in the data": data_state}


def _difference(found: dict[str, Any], expected: dict[str, Any]) -> str | None:
    names = (n for n in found.keys() | expected.keys() if found.get(n) != expected.get(n))
    return next((f"{name} differs" for name in names), None)


@contextlib.contextmanager
def _run(workdir: Path, num_processes: int) -> Iterator[list[Process]]:
    """Start or resume a small training run that carries state between its batches, and kill it.

    The parent of `workdir` has what runs share: corpus, compiled programs, and logs.
    """
    folder, corpus = workdir.parent, workdir.parent / "corpus.txt"
    if not corpus.exists():
        draw = random.Random(0)
        corpus.write_text("".join(draw.choices("abcdefgh \n", k=20_011)), encoding="utf-8")
    data = {"source": corpus, "split": "position", "mode": "stream", "cache_dir": folder / "tokens"}
    steps = {"epochs": 0, "steps": STEPS, "save_every": SAVE_EVERY, "eval_every": 0}
    command = [sys.executable, f"{ROOT}/scripts/train.py", f"--config={ROOT}/configs/tiny.py"]
    command += [f"--config.data.{field}={value}" for field, value in data.items()]
    command += [f"--config.train.{field}={value}" for field, value in steps.items()]
    command += ["--config.train.sample_every=0", f"--workdir={workdir}"]
    # The uninterrupted run compiles the programs for all.
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    commands = [command]
    if num_processes > 1:
        with socket.create_server(("127.0.0.1", 0)) as server:
            command += ["--distributed", f"--coordinator=127.0.0.1:{server.getsockname()[1]}"]
        command += [f"--num_processes={num_processes}", "--join_timeout=30"]
        commands = [[*command, f"--process_id={number}"] for number in range(num_processes)]
        environment |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
    with open(workdir.with_suffix(".log"), "ab") as log:
        options: Any = {"env": environment, "stdout": log, "stderr": log}
        # A group of its own, so that a signal also reaches its child, which trains.
        processes = [subprocess.Popen(each, start_new_session=True, **options) for each in commands]
    try:
        yield processes
    finally:
        for process in processes:
            _send(process, signal.SIGKILL)
            process.wait()


def _log_of(workdir: Path) -> str:
    """Output of all processes of a run."""
    return workdir.with_suffix(".log").read_text(encoding="utf-8", errors="replace")


def _send(process: Process, number: signal.Signals) -> None:
    if process.poll() is None:
        os.killpg(process.pid, number)


def _train(workdir: Path, num_processes: int = 1) -> None:
    with _run(workdir, num_processes) as processes:
        codes = [process.wait() for process in processes]
    if any(codes):
        raise RuntimeError(f"run {workdir} failed with codes {codes}:\n{_log_of(workdir)}")


def _kill_a_run(workdir: Path, processes: list[Process], draw: random.Random) -> Outcome:
    """Kill a run, with an even number inside a save if it can be met."""
    if int(workdir.name) % 2:
        _wait_for_a_moment(workdir, processes, draw)
    else:
        _stop_inside_a_save(workdir, processes, draw)
    _send(processes[0], signal.SIGKILL)
    processes[0].wait()
    return f"killed {'inside a save' if _is_saving(workdir) else 'between saves'}", None


def _stop_inside_a_save(workdir: Path, processes: list[Process], draw: random.Random) -> None:
    """Stop the process at a random moment of a random save; return also if it ends before."""
    _wait_for_save(workdir, processes, draw.randrange(STEPS // SAVE_EVERY - 1))
    while processes[0].poll() is None:
        if _is_saving(workdir):
            time.sleep(draw.uniform(0, 0.05))
            _send(processes[0], signal.SIGSTOP)
            if _is_saving(workdir):
                return
            _send(processes[0], signal.SIGCONT)
        time.sleep(0.001)


def _is_saving(workdir: Path) -> bool:
    """Whether there is an incomplete checkpoint."""
    return any(
        UNFINISHED_MARK in path.name
        or (path.name.isdecimal() and not manifest.has_manifest(str(path)))
        for path in workdir.glob("checkpoints/*")
    )


def _lose_a_process(workdir: Path, processes: list[Process], draw: random.Random) -> Outcome:
    """Kill or stop one process, and wait for the other."""
    victim = draw.randrange(2)
    # A stopped process is alive and hangs.
    sent = draw.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP])
    when = _wait_for_a_moment(workdir, processes, draw)
    _send(processes[victim], sent)
    started, code = time.monotonic(), None
    with contextlib.suppress(subprocess.TimeoutExpired):
        code = processes[1 - victim].wait(_ENDS_WITHIN)
    took = f"{time.monotonic() - started:.1f} s"
    problem = None
    if code is None:
        problem = f"the other has not ended within {took}"
    # Without a reason, it may have ended regularly before the signal was sent.
    elif code and (code not in _REASONS or _REASONS[code] not in _log_of(workdir)):
        problem = f"the other ended with code {code} and without its reason"
    return f"{sent.name} to process {victim} {when}, the other waited for {took}", problem


def _wait_for_a_moment(workdir: Path, processes: list[Process], draw: random.Random) -> str:
    """Wait until a random moment of the start, or after a random save; describe it."""
    save = draw.randrange(STEPS // SAVE_EVERY)
    _wait_for_save(workdir, processes, save)
    seconds = draw.uniform(0, _SAVE_SECONDS if save else _START_SECONDS)
    time.sleep(seconds)
    what = f"the save of step {save * SAVE_EVERY}" if save else "its start"
    return f"{seconds:.1f} s after {what}"


def _wait_for_save(workdir: Path, processes: list[Process], save: int) -> None:
    """Wait until there is a folder of this save, counted from 1, or a process has ended."""
    checkpoints = CheckpointFolder(str(workdir))
    while all(process.poll() is None for process in processes):
        if max(checkpoints.steps(), default=0) >= save * SAVE_EVERY:
            return
        time.sleep(0.01)


def _damage(step_path: Path, draw: random.Random) -> str:
    """Damage a random file; return a description."""
    file = draw.choice(sorted(path for path in step_path.rglob("*") if path.is_file()))
    content = bytearray(file.read_bytes())
    kind = draw.choice(["flip", "truncate", "delete"]) if content else "delete"
    position = draw.randrange(len(content)) if content else 0
    if kind == "flip":
        content[position] ^= 1 << draw.randrange(8)
    file.write_bytes(content[:position] if kind == "truncate" else content)
    if kind == "delete":
        file.unlink()
    return f"{kind} {file.relative_to(step_path)} at {position}"


EXPERIMENTS: dict[str, Callable[[Path, int], int]] = {
    "kill": functools.partial(interrupt_runs, interrupt=_kill_a_run, num_processes=1),
    "damage": damage_checkpoints,
    "hosts": functools.partial(interrupt_runs, interrupt=_lose_a_process, num_processes=2),
}
"""``(folder, count) -> exit code``, by name."""
