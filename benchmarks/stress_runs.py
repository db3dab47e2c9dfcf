"""Small training runs that `stress` tries to break, and what it compares their checkpoints by."""

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from simplernn_jax.checkpoint.checkpointer import read_config
from simplernn_jax.checkpoint.contents import read_arrays, read_json, saved_leaves
from simplernn_jax.checkpoint.folder import CheckpointFolder

STEPS, SAVE_EVERY = 24, 3

_ROOT = Path(__file__).resolve().parent.parent


def start(
    folder: Path, workdir: Path, *flags: str, log: str = "", devices: int = 0
) -> subprocess.Popen[bytes]:
    """Starts, or goes on with, a small training run that carries state between its batches.

    Args:
      folder: keeps what several runs share.
      workdir: of the run, below `folder`.
      flags: further ones of scripts/train.py.
      log: name of the file in `folder` that gets what the run says; empty: that of the workdir.
      devices: above 0, so many simulated ones on the CPU.
    """
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
    command += flags
    # The programs are compiled once, by the run that is left alone.
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    if devices:
        environment |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    with open(folder / (log or f"{workdir.name}.log"), "ab") as output:
        return subprocess.Popen(command, env=environment, stdout=output, stderr=output)


def train(folder: Path, workdir: Path) -> None:
    """Trains to the end."""
    if start(folder, workdir).wait() != 0:
        log = (folder / f"{workdir.name}.log").read_text(encoding="utf-8", errors="replace")
        raise RuntimeError(f"the training run in {workdir} failed:\n{log}")


def final_checkpoint(workdir: Path) -> dict[str, Any]:
    """What the newest checkpoint is compared by."""
    return contents(workdir, read_config(str(workdir))[2])


def contents(workdir: Path, step: int) -> dict[str, Any]:
    """What the checkpoint of `step` is compared by."""
    path = CheckpointFolder(str(workdir)).step_path(step)
    arrays = read_arrays(path, list(saved_leaves(path)))
    return comparable(step, read_json(path, "data"), arrays)


def comparable(step: int, data_state: Any, arrays: dict[str, Any]) -> dict[str, Any]:
    """What two checkpoints are compared by."""
    values = {
        f"array {name}": (str(array.dtype), array.shape, np.asarray(array).tobytes())
        for name, array in arrays.items()
    }
    return values | {"step": step, "position in the data": data_state}


def compare(found: dict[str, Any], expected: dict[str, Any]) -> str | None:
    """What differs between two checkpoints, if anything."""
    for name in found.keys() | expected.keys():
        if found.get(name) != expected.get(name):
            return f"{name} differs"
    return None
