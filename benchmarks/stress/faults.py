"""Runs that are interrupted in every way, and resume to the same bytes.

Runs are killed, or a call that writes fails; one of several processes is lost; or they are resumed
at every step, in every batch mode, on every mesh.
"""

import errno
import itertools
import os
import random
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from simplernn_jax.checkpoint.folder import CheckpointFolder, find_corruption
from simplernn_jax.cli.compilation_cache import use_compilation_cache

from ..measure import on_simulated_devices
from . import Case
from .runs import (
    Process,
    Run,
    Variant,
    difference,
    disturb_runs,
    exit_code,
    log_of,
    read_checkpoint,
    run_quietly,
    send,
    small_config,
    wait_for_a_moment,
)

_ALL = 10**9
"""More calls than any run has."""
_RECORD_BYTES = 8192


class Faults:
    """The library of ``faults.c``, compiled into a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._library = folder, folder / "faults.so"
        compiler = shlex.split(os.environ.get("CC", "")) or ["cc"]
        source = str(Path(__file__).with_suffix(".c"))
        options = ("-O2", "-U_FORTIFY_SOURCE", "-shared", "-fPIC")
        command = [*compiler, *options, source, "-o", str(self._library), "-ldl"]
        subprocess.run(command, check=True)

    def variables(
        self, below: Path, first: int = _ALL, count: int = 1, error: int = 0
    ) -> dict[str, str]:
        """Variables of processes whose calls `first` and the next ones below a folder fail.

        Without arguments, calls are counted only.
        """
        self._record(below).write_bytes(bytes(_RECORD_BYTES))
        faults = f"{first} {count} {error} {self._record(below)} {below}"
        return {"LD_PRELOAD": str(self._library), "FAULTS": faults}

    def read_calls(self, below: Path) -> tuple[int, str]:
        """Number of calls below a folder; name and path of the first that failed, or ``""``."""
        content = self._record(below).read_bytes()
        return int.from_bytes(content[:8], "little"), content[8:].partition(b"\0")[0].decode()

    def _record(self, below: Path) -> Path:
        return self._folder / f"{below.name}.calls"


_FAILS_WITHIN = 120.0
"""Seconds in which a run must end whose calls fail."""
_ERRORS = (errno.ENOSPC, errno.EIO, errno.EDQUOT)
_NOT_REACHED = "not reached"
"""Kind of the runs that end before their fault: their length varies."""

_FLAGS = {
    "stream": (),
    "window": ("data.mode=window",),
    "document": ("data.mode=document",),
    "Muon": ("optimizer.name=muon", "optimizer.learning_rate=0.01"),
    "bfloat16": ("model.precision=bfloat16",),
    "hybrid": ("model.mixer=simple_rnn,attention",),
    "accumulation": ("train.gradient_accumulation=2",),
    "early stopping": ("train.eval_every=3", "train.early_stopping_patience=99"),
    "dropout": ("model.dropout=0.2",),
    "evaluation": ("train.eval_every=1",),
}
"""Flags of the runs that are killed; most of the time of the last are evaluations."""
_SHORT = Variant("short", ("model.num_layers=1", "train.steps=9", "train.eval_every=3"))
"""The run whose calls fail. Three saves: with the third, the first is deleted."""


def full_disk(folder: Path, count: int, seed: int) -> Iterator[Case]:
    """A run in which any write fails ends in one line, and resumes to the same bytes.

    A call fails alone, with some that follow, or with all of them.
    """
    faults = Faults(folder)
    return disturb_runs(
        folder, count, seed, [_SHORT], lambda run: _fail(faults, run, seed), alone=faults.variables
    )


def _fail(faults: Faults, run: Run, seed: int) -> tuple[str, str | None, str]:
    """Let calls of a run that write fail, and check how it ends."""
    draw, above = run.draw, run.workdir.parent
    num_calls, _ = faults.read_calls(above.parent / run.variant.name)
    # No call is drawn twice before each has been drawn once.
    numbers = random.Random(seed).sample(range(num_calls), num_calls)
    first = 1 + numbers[run.number % num_calls]
    fails, error = draw.choice([1, draw.randint(2, 30), _ALL]), draw.choice(_ERRORS)
    with run.start(faults.variables(above, first, fails, error)) as (process,):
        code = exit_code(process, _FAILS_WITHIN)
    call, log = faults.read_calls(above)[1], log_of(run.workdir)
    kind = {1: "one call", _ALL: "all from one on"}.get(fails, "some calls")
    what = f"{errno.errorcode[error]} in call {first} of {num_calls}, {kind}, {call}"
    return what, _problem_of_end(run.workdir, code, log), kind if call else _NOT_REACHED


def _problem_of_end(workdir: Path, code: int | None, log: str) -> str | None:
    if code is None:
        return f"has not ended within {_FAILS_WITHIN:.0f} s: {log[-500:]}"
    errors = [line for line in log.splitlines() if line.startswith("error: ")]
    if code not in (0, 2) or len(errors) != (code == 2) or "Traceback" in log:
        return f"code {code}, {len(errors)} errors: {log[-2000:]}"
    left = [path.name for path in workdir.parent.rglob("*.tmp")]
    if left:
        return f"left behind: {', '.join(left)}"
    checkpoints = CheckpointFolder(str(workdir))
    for step in checkpoints.steps():
        corruption = find_corruption(checkpoints.step_path(step))
        if corruption is not None:
            return f"the checkpoint of step {step} is corrupted: {corruption}"
    return None


_ENDS_WITHIN = 60.0
"""Seconds in which the other processes must end."""
_REASONS = {76: "error: a peer process failed", 2: "error: not all processes"}
"""Exit codes of the other processes, and the reason in their log."""


def kill(folder: Path, count: int, seed: int) -> Iterator[Case]:
    """A run killed at a random moment and resumed ends with the same bytes.

    SIGKILL comes during the start or after a random save, which may not have ended.
    """
    variants = [Variant(name, flags) for name, flags in _FLAGS.items()]
    return disturb_runs(folder, count, seed, variants, _lose_process)


def hosts(folder: Path, count: int, seed: int) -> Iterator[Case]:
    """When a process is lost the others exit with the reason, and all resume to the same bytes.

    It is one of two processes, in every fourth case one of four. A stopped process is alive and
    hangs, as one that is cut off.
    """
    two, four = Variant("2 processes", size=2), Variant("4 processes", size=4)
    return disturb_runs(folder, count, seed, [two, two, two, four], _lose_process)


def _lose_process(run: Run) -> tuple[str, str | None, str]:
    size = run.variant.size
    kind, victim = "stopped" if size > 1 and run.number % 2 else "killed", run.draw.randrange(size)
    with run.start({}) as processes:
        when = wait_for_a_moment(run.workdir, processes, run.draw)
        codes = [process.poll() for process in processes]
        if codes == [0]:
            return "ended before", None, _NOT_REACHED
        started = time.monotonic()
        problem = f"ended before with codes {codes}" if any(codes) else None
        if problem is None:
            send(processes[victim], signal.SIGKILL if kind == "killed" else signal.SIGSTOP)
            others = [process for process in processes if process is not processes[victim]]
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


_MODES = ("window", "stream", "document")
_ONE_DEVICE = "one device"
_MESHES = (_ONE_DEVICE, "data 2", "fsdp 2", "tensor 2", "sequence 2", "pipeline 2")
_STEPS = 60
"""Steps of the runs that are resumed at each of them."""
_CASES_OF_A_RUN = 4
"""Cases of a run in a sample; one that is resumed at all steps has _STEPS - 1."""


def resume(folder: Path, count: int, seed: int) -> Iterator[Case]:
    """A run resumed at any step, in any batch mode, ends with the same bytes, on six meshes."""
    draw = random.Random(seed)
    runs = list(itertools.product(_MODES, _MESHES))
    draw.shuffle(runs)
    if count < len(runs) * (_STEPS - 1):
        runs = runs[: -(-count // _CASES_OF_A_RUN)]
    num_steps = min(-(-count // len(runs)), _STEPS - 1)
    for mode, mesh in runs:
        steps = draw.sample(range(1, _STEPS), num_steps)
        given = {"folder": folder, "mode": mode, "mesh": mesh, "steps": steps}
        yield from on_simulated_devices(2, train_and_resume, **given)


def train_and_resume(folder: Path, mode: str, mesh: str, steps: Sequence[int]) -> list[Case]:
    """Run to the end, then once more from each of `steps`; for `on_simulated_devices`."""
    use_compilation_cache()
    whole, resumed = folder / f"{mesh} {mode}", folder / "resumed"
    _train(folder, mode, mesh, 1, whole)
    expected, cases = read_checkpoint(whole), []
    for step in steps:
        checkpoint = Path("checkpoints", str(step))
        shutil.copytree(whole / checkpoint, resumed / checkpoint)
        _train(folder, mode, mesh, 0, resumed)
        problem = difference(read_checkpoint(resumed), expected)
        cases.append(Case(f"{mode} on {mesh} at {step}", problem, mesh))
        shutil.rmtree(resumed)
    return cases


def _train(folder: Path, mode: str, mesh: str, save_every: int, workdir: Path) -> None:
    sizes = {"num_layers": 2, "vocab_size": 260, "steps": _STEPS, "save_every": save_every}
    config = small_config(folder, mode=mode, keep_last=_STEPS, **sizes)
    if mesh != _ONE_DEVICE:
        setattr(config.mesh, mesh.split(maxsplit=1)[0], 2)
    run_quietly(config, workdir)
