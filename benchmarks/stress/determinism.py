"""The same run under another load, on other cores, in another process, with other threads."""

import contextlib
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from .experiment import Case
from .runs import PARALLEL, difference, read_checkpoint, train, write_text

_STEPS = ("--config.train.steps=6", "--config.train.save_every=6")
_WIDE = [f"--config.model.{field}=128" for field in ("hidden_dim", "key_dim", "value_dim")]
VARIANTS = {
    # Matmuls and reductions that XLA divides among threads.
    "wide": (
        *_WIDE,
        "--config.model.mlp_dim=512",
        "--config.data.batch_size=16",
        "--config.data.sequence_length=128",
    ),
    "gla": (*_WIDE, "--config.model.block=gla", "--config.model.precision=bfloat16"),
    "dropout": ("--config.model.dropout=0.2", "--config.data.mode=window"),
    "Muon": ("--config.optimizer.name=muon", "--config.model.mixer=simple_rnn,attention"),
}
"""Flags of the runs."""


class Setting(NamedTuple):
    """Number of threads and other settings that must not change a run."""

    variant: str
    threads: int
    """Threads of XLA's pool, which the C functions share; otherwise it has one for each core."""
    cores: int
    is_loaded: bool
    has_own_programs: bool
    """Compile again, instead of loading what another run has compiled."""
    hash_seed: int


def determinism(folder: Path, count: int, seed: int) -> Iterator[Case]:
    """Run every second case with 2 threads, and the others with 1, 4 or 8."""
    settings = [_draw_setting(number, seed) for number in range(count)]
    names = {setting.variant for setting in settings}
    plain = [Setting(name, 2, _cores(), False, False, 0) for name in VARIANTS if name in names]
    write_text(folder / "corpus.txt")  # before several runs write it

    def run(numbered: tuple[int, Setting]) -> dict[str, Any]:
        return _run(folder / str(numbered[0]), numbered[1])

    with ThreadPoolExecutor(PARALLEL) as pool:
        plain_runs = pool.map(run, enumerate(plain, count))
        expected = {
            setting.variant: found for setting, found in zip(plain, plain_runs, strict=True)
        }
        runs = pool.map(run, enumerate(settings))
        for number, (setting, found) in enumerate(zip(settings, runs, strict=True)):
            kind = f"{setting.threads} thread{'s' * (setting.threads > 1)}"
            problem = difference(found, expected[setting.variant])
            yield Case(f"{number}, {setting}", problem, kind)


def _draw_setting(number: int, seed: int) -> Setting:
    draw = random.Random(f"{seed} {number}")
    threads = draw.choice([1, 4, 8]) if number % 2 else 2
    return Setting(
        variant=list(VARIANTS)[number // 2 % len(VARIANTS)],
        threads=threads,
        cores=draw.randint(1, min(2, _cores())),
        is_loaded=draw.random() < 0.5,
        has_own_programs=draw.random() < 0.5 or threads != 2,  # XLA compiles for its threads
        hash_seed=draw.randrange(1, 2**32),
    )


def _run(workdir: Path, setting: Setting) -> dict[str, Any]:
    """Train in a process of its own; return its last checkpoint."""
    # XLA's thread pool follows NPROC, else the cores that the process may use.
    variables = {"NPROC": str(setting.threads), "PYTHONHASHSEED": str(setting.hash_seed)}
    if setting.has_own_programs:
        variables["JAX_COMPILATION_CACHE_DIR"] = f"{workdir}-programs"
    flags = (*VARIANTS[setting.variant], *_STEPS)
    with _on_cores(setting.cores), _busy_loops(setting.cores if setting.is_loaded else 0):
        train(workdir, flags=flags, environment=variables)
    return read_checkpoint(workdir)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


@contextlib.contextmanager
def _on_cores(count: int) -> Iterator[None]:
    """Restrict this thread, and the processes that it starts, to some cores."""
    if sys.platform != "linux":
        yield
        return
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(cores)[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


@contextlib.contextmanager
def _busy_loops(count: int) -> Iterator[None]:
    # Also ends if this process is killed.
    loop_code = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: pass"
    words = [sys.executable, "-c", loop_code]
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            loop = stack.enter_context(subprocess.Popen(words))
            stack.callback(loop.kill)
        yield
