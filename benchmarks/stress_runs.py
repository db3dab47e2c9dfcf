"""Small training runs of one or two processes, and comparison of their checkpoints."""

import os
import random
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from simplernn_jax.checkpoint.checkpointer import read_config
from simplernn_jax.checkpoint.contents import read_arrays, read_json, saved_leaves
from simplernn_jax.checkpoint.folder import CheckpointFolder

STEPS, SAVE_EVERY = 24, 3
Process = subprocess.Popen[bytes]

_ROOT = Path(__file__).resolve().parents[1]
_DEVICES = 2
"""Simulated devices of each of several processes."""
_JOIN_SECONDS = 30


def start(workdir: Path, num_processes: int = 1) -> list[Process]:
    """Start or resume a small training run that carries state between its batches.

    Args:
      workdir: of the run. Its parent has what runs share: corpus, compiled programs, and logs.
      num_processes: more than one train together on simulated devices.
    """
    folder = workdir.parent
    corpus = folder / "corpus.txt"
    if not corpus.exists():
        draw = random.Random(0)
        corpus.write_text("".join(draw.choices("abcdefgh \n", k=20_011)), encoding="utf-8")
    overrides = {
        "data.source": corpus,
        "data.split": "position",
        "data.mode": "stream",
        "data.cache_dir": folder / "tokens",
        "train.epochs": 0,
        "train.steps": STEPS,
        "train.save_every": SAVE_EVERY,
        "train.eval_every": 0,
        "train.sample_every": 0,
    }
    command = [sys.executable, str(_ROOT / "scripts" / "train.py")]
    command += [f"--config={_ROOT / 'configs' / 'tiny.py'}", f"--workdir={workdir}"]
    command += [f"--config.{field}={value}" for field, value in overrides.items()]
    # The uninterrupted run compiles the programs for all.
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    if num_processes > 1:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        command += ["--distributed", f"--coordinator=127.0.0.1:{port}"]
        command += [f"--num_processes={num_processes}", f"--join_timeout={_JOIN_SECONDS}"]
        environment |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(_DEVICES)}
    processes = []
    with open(_log_of(workdir), "ab") as log:
        for number in range(num_processes):
            own = [f"--process_id={number}"] if num_processes > 1 else []
            processes.append(
                subprocess.Popen([*command, *own], env=environment, stdout=log, stderr=log)
            )
    return processes


def read_log(workdir: Path) -> str:
    """Output of all processes of a run."""
    return _log_of(workdir).read_text(encoding="utf-8", errors="replace")


def _log_of(workdir: Path) -> Path:
    return workdir.with_name(f"{workdir.name}.log")


def kill(processes: list[Process]) -> None:
    """Kill the processes, which ends their children too, and wait for them."""
    for process in processes:
        process.kill()
        process.wait()


def train(workdir: Path, num_processes: int = 1) -> None:
    """Train to the end.

    Raises:
      RuntimeError: the run failed; the message has its log.
    """
    processes = start(workdir, num_processes)
    try:
        codes = [process.wait() for process in processes]
    finally:
        kill(processes)
    if any(codes):
        raise RuntimeError(f"run {workdir} failed with codes {codes}:\n{read_log(workdir)}")


def newest_checkpoint(workdir: str | Path) -> dict[str, Any]:
    """`contents` of the newest complete checkpoint."""
    return contents(workdir, read_config(str(workdir))[2])


def contents(workdir: str | Path, step: int) -> dict[str, Any]:
    """Everything in the checkpoint of `step`, as `comparable`."""
    path = CheckpointFolder(str(workdir)).step_path(step)
    arrays = read_arrays(path, list(saved_leaves(path)))
    return comparable(step, read_json(path, "data"), arrays)


def comparable(step: int, data_state: Any, arrays: dict[str, Any]) -> dict[str, Any]:
    """Contents of a checkpoint as values that ``==`` compares bit-exactly."""
    values = {
        name: (str(array.dtype), array.shape, np.asarray(array).tobytes())
        for name, array in arrays.items()
    }
    return values | {"number of steps": step, "position in the data": data_state}


def compare(found: dict[str, Any], expected: dict[str, Any]) -> str | None:
    """The first difference between two checkpoints, or None."""
    for name in found.keys() | expected.keys():
        if found.get(name) != expected.get(name):
            return f"{name} differs"
    return None
