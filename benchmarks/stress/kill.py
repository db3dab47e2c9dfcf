"""Runs that are killed or interrupted, and resumed."""

import contextlib
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from simplernn_jax.checkpoint.folder import CheckpointFolder
from simplernn_jax.training.metrics import read_metrics

from .experiment import Case
from .runs import (
    PARALLEL,
    SAVE_EVERY,
    STEPS,
    Process,
    exit_code,
    is_saving,
    log_of,
    read_checkpoint,
    resume,
    send,
    start_run,
    train,
    wait_for_a_moment,
    wait_for_save,
)

_SAVES_WITHIN = 10.0
"""Seconds in which an interrupted run must save and exit, once its programs are compiled."""
_COMPILES_WITHIN = 60.0
_COMPILES_EVERY = 5
"""One in this many runs that get a signal compiles all of its programs, and gets it meanwhile."""
_PYTHON_STARTS_WITHIN = 0.5
"""Seconds in which Python itself, which has its own handlers of signals, starts."""

VARIANTS = {
    "stream": (),
    "window": ("--config.data.mode=window",),
    "document": ("--config.data.mode=document",),
    "Muon": ("--config.optimizer.name=muon", "--config.optimizer.learning_rate=0.01"),
    "bfloat16": ("--config.model.precision=bfloat16",),
    "hybrid": ("--config.model.mixer=simple_rnn,attention",),
    "accumulation": ("--config.train.gradient_accumulation=2",),
    "early stopping": ("--config.train.eval_every=3", "--config.train.stop_after_worse=99"),
    "dropout": ("--config.model.dropout=0.2",),
    "fine-tuning": ("--config.train.init_from={folder}/pretrained",),
}
"""Flags of the runs that are killed, one after the other."""

INTERRUPTED = VARIANTS | {"evaluation": ("--config.train.eval_every=1",)}
"""Flags of the runs that get a signal; most of the time of the last ones are evaluations."""

Run = Callable[[], contextlib.AbstractContextManager[list[Process]]]
Interruption = Callable[[Path, random.Random, Run], tuple[str, str | None, str]]
"""``(workdir, draw, start) -> (description, problem, kind)``; ``start()`` starts or resumes."""


def kill(folder: Path, count: int, seed: int) -> Iterator[Case]:
    """Send SIGKILL to runs of all `VARIANTS`, half of them inside a save.

    Of ten runs, one is killed while it reads its checkpoint, one while it compiles, and three at
    random moments.
    """
    return _interrupt_runs(folder, count, seed, VARIANTS, _kill_a_run)


def signals(folder: Path, count: int, seed: int) -> Iterator[Case]:
    """Send SIGTERM or SIGINT at random moments, to every third run twice.

    Every fifth run compiles all of its programs, and gets the signal meanwhile.
    """
    return _interrupt_runs(folder, count, seed, INTERRUPTED, _interrupt_a_run)


def _interrupt_runs(
    folder: Path,
    count: int,
    seed: int,
    flags_of: Mapping[str, Sequence[str]],
    interrupt: Interruption,
) -> Iterator[Case]:
    """Interrupt and resume `count` runs, which must end as those that nothing interrupts."""
    variants = list(flags_of)[:count]
    flags = {
        name: [
            "--config.train.log_every=1",
            *(flag.format(folder=folder) for flag in flags_of[name]),
        ]
        for name in variants
    }
    if "fine-tuning" in variants:
        train(folder / "pretrained")
    expected: dict[str, Any] = {}

    def run_alone(name: str) -> None:
        train(folder / name, flags=flags[name])
        expected[name] = read_checkpoint(folder / name)

    def interrupt_and_resume(number: int) -> Case:
        name = variants[number % len(variants)]
        workdir = folder / str(number)
        draw = random.Random(f"{seed} {number}")
        programs = folder / "programs"
        compiles = _moment(number) == "while compiling"
        if compiles if interrupt is _kill_a_run else number % _COMPILES_EVERY == 0:
            programs = workdir.with_suffix(".programs")  # whose rest the resumed run meets
        options: Any = {"flags": flags[name]}
        options["environment"] = {"JAX_COMPILATION_CACHE_DIR": str(programs)}
        what, problem, kind = interrupt(workdir, draw, lambda: start_run(workdir, **options))
        problem = problem or resume(workdir, expected[name], **options)
        for path in (workdir, workdir.with_suffix(".programs")):
            shutil.rmtree(path, ignore_errors=True)
        return Case(f"run {number}, {name}, {what}", problem, kind)

    with ThreadPoolExecutor(PARALLEL) as pool:
        list(pool.map(run_alone, variants))
        yield from pool.map(interrupt_and_resume, range(count))


def _moment(number: int) -> str:
    """Moment at which a run is killed; the second ten runs are other variants at each moment."""
    moments = ("inside a save", "inside a restore", "", "while compiling", "")
    place = (number + number // 10) % 10
    return moments[place] if place < 5 else moments[0] if place < 9 else ""


def _kill_a_run(workdir: Path, draw: random.Random, start: Run) -> tuple[str, str | None, str]:
    moment = _moment(int(workdir.name))
    if moment == "inside a restore":
        with start() as (process,):
            wait_for_save(workdir, [process], draw.randrange(2, STEPS // SAVE_EVERY - 1))
            send(process, signal.SIGKILL)
            process.wait()
    with start() as (process,):
        if moment == "inside a save":
            _stop_inside_a_save(workdir, process, draw)
        elif moment == "inside a restore":
            moment = _stop_inside_a_restore(workdir, process, draw)
        elif moment == "while compiling":
            moment = _wait_for_compilation(workdir, process, draw)
        else:
            wait_for_a_moment(workdir, [process], draw)
        send(process, signal.SIGKILL)
        process.wait()
    if moment in ("inside a save", ""):
        moment = "inside a save" if is_saving(workdir) else "between saves"
    return f"killed {moment}", None, moment


def _stop_inside_a_restore(workdir: Path, process: Process, draw: random.Random) -> str:
    """Stop the process while it has a file of a checkpoint open; return what it was doing.

    All of them are read within 10 ms, so the process runs for 1 ms at a time.
    """
    files = re.compile(re.escape(f"{workdir}/checkpoints/") + r"\d+")
    to_skip = draw.randrange(3)
    while process.poll() is None and "resuming" not in log_of(workdir):
        send(process, signal.SIGSTOP)
        if any(map(files.match, _open_files(process))):
            if not to_skip:
                return "inside a restore"
            to_skip -= 1
        send(process, signal.SIGCONT)
        time.sleep(0.001)
    return "after a restore"


def _open_files(process: Process) -> Iterator[str]:
    """Paths of the files that the processes of a run have open."""
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has just ended
            if os.getpgid(int(path.name)) == process.pid:
                for link in os.listdir(path / "fd"):
                    with contextlib.suppress(OSError):  # just closed
                        yield os.readlink(path / "fd" / link)


def _wait_for_compilation(workdir: Path, process: Process, draw: random.Random) -> str:
    """Wait for a moment between the first line and the first step; return what it does then."""
    while process.poll() is None and " parameters" not in log_of(workdir):
        time.sleep(0.01)
    time.sleep(draw.uniform(0, 2))
    return "after a compilation" if "step 1/" in log_of(workdir) else "while compiling"


def _stop_inside_a_save(workdir: Path, process: Process, draw: random.Random) -> None:
    """Stop the process at a random moment of a random save; return also if it ends before."""
    wait_for_save(workdir, [process], draw.randrange(STEPS // SAVE_EVERY - 1))
    while process.poll() is None:
        if is_saving(workdir):
            time.sleep(draw.uniform(0, 0.05))
            send(process, signal.SIGSTOP)
            if is_saving(workdir):
                return
            send(process, signal.SIGCONT)
        time.sleep(0.001)


def _interrupt_a_run(workdir: Path, draw: random.Random, start: Run) -> tuple[str, str | None, str]:
    """Send a signal, or two soon after each other, and wait for the run's end."""
    number = int(workdir.name)
    sent = draw.choice([signal.SIGTERM, signal.SIGINT])
    is_twice = number % 3 == 0
    began = time.monotonic()
    with start() as (process,):
        if number % _COMPILES_EVERY == 0:
            when = _wait_for_compilation(workdir, process, draw)
        else:
            when = wait_for_a_moment(workdir, [process], draw)
        has_workdir, steps = workdir.exists(), _recorded_steps(workdir)
        send(process, sent)
        sent_after = time.monotonic() - began
        if is_twice:
            time.sleep(draw.uniform(0, 1))
            send(process, sent)
        started = time.monotonic()
        code = exit_code(process, _SAVES_WITHIN if steps else _COMPILES_WITHIN)
    took = f"{time.monotonic() - started:.1f} s"
    log, saved = log_of(workdir), CheckpointFolder(str(workdir)).steps()
    allowed = {75}
    if STEPS in saved:
        allowed.add(0)  # it had just ended
    if sent == signal.SIGINT and not has_workdir:
        allowed.add(130)
    if sent_after < _PYTHON_STARTS_WITHIN:
        allowed |= {-sent, 128 + sent, 1}
    problem = None
    if code is None:
        problem = f"has not ended within {took}"
    elif code not in allowed:
        problem = f"ended with code {code}: {log[-500:]}"
    elif "Traceback" in log and sent_after >= _PYTHON_STARTS_WITHIN:
        problem = f"a traceback: {log[-500:]}"
    elif not is_twice and max(saved, default=0) < steps:
        problem = f"step {steps} was recorded, and no later one than {saved} is saved"
    kind = f"{'two' if is_twice else 'one'} {sent.name}"
    kind += " while compiling" if when == "while compiling" else ""
    return f"{kind}, sent {when}, code {code} after {took}", problem, kind


def _recorded_steps(workdir: Path) -> int:
    """Last step in the metrics of a run; 0 before the first one."""
    rows = read_metrics(str(workdir))
    return max((row["step"] for row in rows if row["kind"] == "train"), default=0)
