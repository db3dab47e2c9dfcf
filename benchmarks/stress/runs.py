"""Small training runs in processes of their own, and the contents of their checkpoints."""

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from simplernn_jax.checkpoint.checkpointer import read_config
from simplernn_jax.checkpoint.contents import read_arrays, read_json, saved_leaves
from simplernn_jax.checkpoint.folder import NEWEST, UNFINISHED_MARK, CheckpointFolder
from simplernn_jax.errors import UserError
from simplernn_jax.project import ROOT

from .network import Proxy

STEPS, SAVE_EVERY = 24, 3
PARALLEL = 2
"""Simultaneous runs: most of a short one is its start, which keeps one core busy."""
START_SECONDS, SAVE_SECONDS = 8.0, 0.5
"""Approximate time of a start, and of three steps and a save."""

Process = subprocess.Popen[bytes]


def read_checkpoint(workdir: str | Path) -> dict[str, Any]:
    """Everything in the newest checkpoint, as values that ``==`` compares bit-exactly."""
    step = read_config(str(workdir), NEWEST)[2]
    path = CheckpointFolder(str(workdir)).step_path(step)
    values = {
        name: (str(array.dtype), array.shape, np.asarray(array).tobytes())
        for name, array in read_arrays(path, list(saved_leaves(path))).items()
    }
    return values | {"number of steps": step, "position in the data": read_json(path, "data")}


def difference(found: dict[str, Any], expected: dict[str, Any]) -> str | None:
    """Name the first difference of two checkpoints."""
    names = (n for n in found.keys() | expected.keys() if found.get(n) != expected.get(n))
    return next((f"{name} differs" for name in names), None)


def distances(found: dict[str, Any], expected: dict[str, Any]) -> dict[str, float]:
    """Norms of all differences of the parameters, the optimizer state etc., relative to theirs."""
    groups: dict[str, list[str]] = {}
    for name, value in expected.items():
        if isinstance(value, tuple) and value[0].startswith("float"):
            groups.setdefault(name.split("/")[0], []).append(name)
    result = {}
    for group, names in groups.items():
        ours, theirs = (
            np.concatenate([np.frombuffer(values[n][2], values[n][0]) for n in names]).astype(float)
            for values in (found, expected)
        )
        norm = max(float(np.linalg.norm(theirs)), 1e-30)
        result[group] = float(np.linalg.norm(ours - theirs)) / norm
    return result


def bytes_of(tree: Any) -> tuple[bytes, ...]:
    """Bytes of all leaves of a tree."""
    return tuple(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree))


def write_text(path: Path, characters: int = 20_011) -> Path:
    """Write a text of random letters, unless it is there."""
    if not path.exists():
        draw = random.Random(0)
        path.write_text("".join(draw.choices("abcdefgh \n", k=characters)), encoding="utf-8")
    return path


def command(workdir: Path, flags: Sequence[str] = ()) -> list[str]:
    """Command of a small run that carries state between its batches.

    The parent of `workdir` has what runs share: corpus, compiled programs, and logs. `flags` of
    the configuration come last.
    """
    folder = workdir.parent
    corpus = write_text(folder / "corpus.txt")
    data = {"source": corpus, "split": "position", "mode": "stream", "cache_dir": folder / "tokens"}
    steps = {"epochs": 0, "steps": STEPS, "save_every": SAVE_EVERY, "eval_every": 0}
    words = [sys.executable, f"{ROOT}/scripts/train.py", f"--config={ROOT}/configs/tiny.py"]
    words += [f"--config.data.{field}={value}" for field, value in data.items()]
    words += [f"--config.train.{field}={value}" for field, value in steps.items()]
    return [*words, "--config.train.sample_every=0", f"--workdir={workdir}", *flags]


@contextlib.contextmanager
def start_run(
    workdir: Path,
    num_processes: int = 1,
    flags: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    of_process: Mapping[int, Mapping[str, str]] | None = None,
    proxies: Mapping[int, Proxy] | None = None,
) -> Iterator[list[Process]]:
    """Start or resume a small training run, and kill what is left of it in the end.

    `environment` replaces variables of all processes, `of_process` those of the processes of these
    numbers; `proxies` are, by number, those through which a process reaches the coordinator.
    """
    folder = workdir.parent
    words = command(workdir, flags)
    # The uninterrupted run compiles the programs for all.
    variables = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        **(environment or {}),
    }
    commands = [words]
    if num_processes > 1:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        addresses = {i: proxy.address(port) for i, proxy in (proxies or {}).items()}
        words += ["--distributed", f"--num_processes={num_processes}", "--join_timeout=30"]
        commands = [
            [*words, f"--process_id={i}", f"--coordinator={addresses.get(i, f'127.0.0.1:{port}')}"]
            for i in range(num_processes)
        ]
        variables |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(4 // num_processes)}
    with open(workdir.with_suffix(".log"), "ab") as log:
        # A group of its own, so that a signal also reaches its child, which trains.
        processes = [
            subprocess.Popen(
                each,
                env=variables | dict((of_process or {}).get(number, {})),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            for number, each in enumerate(commands)
        ]
    try:
        yield processes
    finally:
        for process in processes:
            send(process, signal.SIGKILL)
            process.wait()


def train(workdir: Path, *args: Any, **options: Any) -> None:
    """Run to the end, or resume; arguments as of `start_run`.

    Raises:
      RuntimeError: it failed.
    """
    with start_run(workdir, *args, **options) as processes:
        codes = [process.wait() for process in processes]
    if any(codes):
        raise RuntimeError(f"run {workdir} failed with codes {codes}:\n{log_of(workdir)}")


def resume(workdir: Path, expected: dict[str, Any], *args: Any, **options: Any) -> str | None:
    """Run to the end, or resume; say what is wrong, or differs from the `expected` checkpoint."""
    try:
        train(workdir, *args, **options)
        problem = difference(read_checkpoint(workdir), expected)
    except (RuntimeError, UserError) as error:
        return f"does not resume: {str(error)[-1000:]}"
    if problem is None and (workdir / "checkpoints_damaged").exists():
        problem = "a checkpoint was taken for damaged"
    return problem


def log_of(workdir: Path) -> str:
    """Output of all processes of a run."""
    return workdir.with_suffix(".log").read_text(encoding="utf-8", errors="replace")


def send(process: Process, number: signal.Signals) -> None:
    """Send a signal to a process and its children, if it runs."""
    if process.poll() is None:
        os.killpg(process.pid, number)


def exit_code(process: Process, seconds: float) -> int | None:
    """Exit code of a process, or None if it does not end within `seconds`."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        return process.wait(max(0.0, seconds))
    return None


def is_saving(workdir: Path) -> bool:
    """Return whether there is an incomplete checkpoint."""
    return any(UNFINISHED_MARK in path.name for path in workdir.glob("checkpoints/*"))


def wait_for_a_moment(workdir: Path, processes: list[Process], draw: random.Random) -> str:
    """Wait until a random moment of the start, or after a random save; describe it."""
    save = draw.randrange(STEPS // SAVE_EVERY)
    wait_for_save(workdir, processes, save)
    seconds = draw.uniform(0, SAVE_SECONDS if save else START_SECONDS)
    time.sleep(seconds)
    what = f"the save of step {save * SAVE_EVERY}" if save else "its start"
    return f"{seconds:.1f} s after {what}"


def wait_for_save(workdir: Path, processes: list[Process], save: int) -> None:
    """Wait until there is a folder of this save, counted from 1, or a process has ended."""
    checkpoints = CheckpointFolder(str(workdir))
    while all(process.poll() is None for process in processes):
        if max(checkpoints.steps(), default=0) >= save * SAVE_EVERY:
            return
        time.sleep(0.01)
