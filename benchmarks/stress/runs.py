"""Small training runs, in this process or in others, and the contents of their checkpoints."""

import contextlib
import io
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging

from simplernn_jax.checkpoint.folder import (
    CheckpointFolder,
    read_arrays,
    read_config,
    read_json,
    saved_leaves,
)
from simplernn_jax.config import Config
from simplernn_jax.errors import UserError
from simplernn_jax.project import ROOT
from simplernn_jax.training import loop

from ..train_steps import change, load_config
from . import Case, run_cases

STEPS, SAVE_EVERY = 24, 3
PARALLEL = 2
"""Simultaneous runs: most of a short one is its start, which keeps one core busy."""
START_SECONDS, SAVE_SECONDS = 8.0, 0.5
"""Approximate time of a start, and of three steps and a save."""

Process = subprocess.Popen[bytes]


def read_checkpoint(workdir: str | Path) -> dict[str, Any]:
    """Everything in the newest checkpoint, as values that ``==`` compares bit-exactly."""
    step = read_config(str(workdir))[2]
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


def bytes_of(tree: Any) -> tuple[bytes, ...]:
    """Bytes of all leaves of a tree."""
    return tuple(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree))


def write_text(path: Path, characters: int = 20_011) -> Path:
    """Write a text of random letters, unless it is there."""
    if not path.exists():
        draw = random.Random(0)
        path.write_text("".join(draw.choices("abcdefgh \n", k=characters)), encoding="utf-8")
    return path


def free_port() -> int:
    """A port that nothing listens to."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@contextlib.contextmanager
def start_run(
    workdir: Path,
    size: int = 1,
    flags: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> Iterator[list[Process]]:
    """Start or resume a small run of `size` processes; kill what is left of it in the end.

    It carries state between its batches. The parent of `workdir` has what runs share: corpus,
    compiled programs, and logs. `flags` of the configuration come last; `environment` replaces
    variables.
    """
    folder = workdir.parent
    corpus = write_text(folder / "corpus.txt")
    data = {"source": corpus, "split": "position", "mode": "stream", "cache_dir": folder / "tokens"}
    steps = {"epochs": 0, "steps": STEPS, "save_every": SAVE_EVERY, "eval_every": 0}
    words = [sys.executable, f"{ROOT}/scripts/train.py", f"--config={ROOT}/configs/tiny.py"]
    words += [f"--config.data.{field}={value}" for field, value in data.items()]
    words += [f"--config.train.{field}={value}" for field, value in steps.items()]
    words += ["--config.train.sample_every=0", f"--workdir={workdir}", *flags]
    # The uninterrupted run compiles the programs for all.
    variables = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        **(environment or {}),
    }
    if size > 1:
        words += ["--distributed", f"--num_processes={size}", "--join_timeout=30"]
        words += [f"--coordinator=127.0.0.1:{free_port()}"]
        variables |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(4 // size)}
    with open(workdir.with_suffix(".log"), "ab") as log:
        # Its own process group, so that a signal also reaches its child, which trains.
        processes = [
            subprocess.Popen(
                [*words, f"--process_id={number}"] if size > 1 else words,
                env=variables,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            for number in range(size)
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
        problem = "a checkpoint was taken for corrupt"
    return problem


class Variant(NamedTuple):
    """Settings of runs that are disturbed."""

    name: str
    flags: Sequence[str] = ()
    """Of the configuration, as ``data.mode=window``."""
    size: int = 1
    """Number of processes."""


class Run(NamedTuple):
    """A run to disturb."""

    number: int
    draw: random.Random
    variant: Variant
    workdir: Path
    """In a folder that also has the tokenized text."""
    start: Callable[[Mapping[str, str]], contextlib.AbstractContextManager[list[Process]]]
    """Start or resume it, with more variables."""


def disturb_runs(
    folder: Path,
    count: int,
    seed: int,
    variants: Sequence[Variant],
    disturb: Callable[[Run], tuple[str, str | None, str]],
    *,
    alone: Callable[[Path], Mapping[str, str]] = lambda above: {},
) -> Iterator[Case]:
    """Disturb and resume `count` runs, which must end as those that nothing disturbs.

    `disturb` returns a description, a problem and a kind; `alone` gives runs that nothing disturbs,
    in a folder named after their variant, more variables of their environment.
    """

    def options(variant: Variant, more: Mapping[str, str]) -> dict[str, Any]:
        environment = {"JAX_COMPILATION_CACHE_DIR": str(folder / "programs"), **more}
        flags = [f"--config.{flag}" for flag in variant.flags]
        return {"size": variant.size, "flags": flags, "environment": environment}

    def run_alone(variant: Variant) -> dict[str, Any]:
        above = folder / variant.name
        above.mkdir()
        train(above / "run", **options(variant, alone(above)))
        return read_checkpoint(above / "run")

    def run_case(number: int, draw: random.Random) -> Case:
        variant, workdir = variants[number % len(variants)], folder / str(number) / "run"
        workdir.parent.mkdir()

        def start(more: Mapping[str, str]) -> Any:
            return start_run(workdir, **options(variant, more))

        what, problem, kind = disturb(Run(number, draw, variant, workdir, start))
        if problem is None:
            problem = resume(workdir, expected[variant], **options(variant, {}))
        shutil.rmtree(workdir.parent)
        return Case(f"run {number}, {variant.name}, {what}", problem, kind)

    with ThreadPoolExecutor(PARALLEL) as pool:
        needed = dict.fromkeys(variants[:count])
        expected = dict(zip(needed, pool.map(run_alone, needed), strict=True))
    yield from run_cases(run_case, count, seed, PARALLEL)


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


def small_config(folder: Path, **fields: Any) -> Config:
    """``configs/tiny.py``, smaller, on a text in `folder`; `fields` of any section by name."""
    config = load_config("tiny", 2, 16)
    sizes = {"num_layers": 1, "hidden_dim": 8, "key_dim": 8, "value_dim": 8, "mlp_dim": 12}
    text = {"source": str(write_text(folder / "corpus.txt", 3001)), "split": "position"}
    text |= {"cache_dir": str(folder / "tokens"), "mode": "stream"}
    steps = {"epochs": 0, "save_every": 0, "eval_every": 0, "eval_tokens": 512}
    return change(config, **{**sizes, **text, **steps, **fields})


def run_quietly(config: Config, workdir: Path) -> None:
    """Train, or resume, without output; raises as `train`, and KeyboardInterrupt for a signal."""
    with quiet():
        result = loop.train(config, str(workdir))
    if result.interrupted_by:
        raise KeyboardInterrupt


@contextlib.contextmanager
def quiet() -> Any:
    """Drop what is printed and logged."""
    logger = logging.get_absl_logger()  # whose level `set_verbosity` would not restore
    before = logger.level
    logger.setLevel("CRITICAL")
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(before)
