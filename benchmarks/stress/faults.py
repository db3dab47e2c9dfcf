"""Runs that are killed or interrupted, or in which a call that writes fails, and that resume."""

import errno
import os
import random
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from simplernn_jax.checkpoint.folder import CheckpointFolder
from simplernn_jax.errors import UserError
from simplernn_jax.training.metrics import read_metrics

from .experiment import Case
from .runs import (
    STEPS,
    Run,
    Variant,
    disturb_runs,
    exit_code,
    log_of,
    send,
    train,
    wait_for_a_moment,
)

ALL = 10**9
"""More calls than any run has."""
FAIL, SIGNAL = "fs"
"""Actions; their numbers are an errno and a signal. See ``faults.c``."""
_RECORD_BYTES = 8192


class Faults:
    """The library of ``faults.c``, compiled into a folder.

    Raises:
      UserError: there is no C compiler.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._library = folder, folder / "faults.so"
        compiler = shlex.split(os.environ.get("CC", "")) or ["cc"]
        source = str(Path(__file__).with_suffix(".c"))
        options = ("-O2", "-U_FORTIFY_SOURCE", "-shared", "-fPIC")
        command = [*compiler, *options, source, "-o", str(self._library), "-ldl"]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            reason = getattr(error, "stderr", None) or error
            raise UserError(f"{' '.join(command)}: {reason}; install a C compiler") from error

    def variables(
        self, below: Path, first: int = ALL, count: int = 1, action: str = FAIL, number: int = 0
    ) -> dict[str, str]:
        """Variables of processes whose calls `first` and the next ones below a folder have faults.

        Without arguments, calls are counted only.
        """
        self._record(below).write_bytes(bytes(_RECORD_BYTES))
        faults = f"{first} {count} {action} {number} {self._record(below)} {below}"
        return {"LD_PRELOAD": str(self._library), "FAULTS": faults}

    def read_calls(self, below: Path) -> tuple[int, str]:
        """Number of calls below a folder; name and path of the first with a fault, or ``""``."""
        content = self._record(below).read_bytes()
        return int.from_bytes(content[:8], "little"), content[8:].partition(b"\0")[0].decode()

    def _record(self, below: Path) -> Path:
        return self._folder / f"{'-'.join(below.relative_to(self._folder).parts)}.calls"


_SAVES_WITHIN, _COMPILES_WITHIN = 10.0, 60.0
"""Seconds in which an interrupted run must save and exit; the latter before the first step."""
_FAILS_WITHIN = 120.0
"""Seconds in which a run must end whose calls fail."""
_PYTHON_STARTS_WITHIN = 0.5
"""Seconds in which Python itself, which has its own handlers of signals, starts."""
_RESTORE_CALLS, _COMPILE_CALLS = 120, 90
"""Approximate number of calls that read a checkpoint, and that read and write compiled programs."""
_ERRORS = (errno.ENOSPC, errno.EIO, errno.EDQUOT)
_NOT_REACHED = "not reached"
"""Kind of the runs that end before the call with a fault: threads vary the number of calls."""

_COMMON = ("train.log_every=1",)
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
"""Flags of the runs that are killed or get a signal; most of the time of the last are evaluations.
"""
_SHORT = Variant("short", ("model.num_layers=1", "train.steps=9", "train.eval_every=3"))
"""The run whose calls fail. Three saves: with the third, the first is deleted."""


def kill(folder: Path, count: int, seed: int) -> Iterator[Case]:
    """A run killed at a random moment and resumed ends with the same bytes.

    SIGKILL comes with a random call that opens, writes or deletes a file: nothing else changes what
    is on the disk. One run in ten is killed once more, while it reads its checkpoint, and one in
    ten while it reads or writes compiled programs.
    """
    faults = Faults(folder)
    return disturb_runs(
        *(folder, count, seed, _variants(folder, count)),
        lambda run: _kill(faults, run),
        is_cold=lambda number: number % 10 == 3,
        alone=lambda above: faults.variables(above, action=SIGNAL),
    )


def signals(folder: Path, count: int, seed: int) -> Iterator[Case]:
    """A run that gets SIGTERM or SIGINT saves, exits, and resumes to the same bytes.

    Signals come at random moments, to every third run twice. Every fifth run compiles all of its
    programs, and gets the signal meanwhile.
    """
    variants = _variants(folder, count)
    return disturb_runs(
        folder, count, seed, variants, _interrupt, is_cold=lambda number: number % 5 == 0
    )


def full_disk(folder: Path, count: int, seed: int) -> Iterator[Case]:
    """A run in which any write fails ends in one line, and resumes to the same bytes.

    A call fails alone, with some that follow, or with all of them. In every tenth run, calls that
    write compiled programs count as well, which all other runs share.
    """
    faults = Faults(folder)
    return disturb_runs(
        *(folder, count, seed, [_SHORT]),
        lambda run: _fail(faults, run, seed),
        is_cold=lambda number: number % 10 == 9,
        alone=faults.variables,
    )


def _variants(folder: Path, count: int) -> list[Variant]:
    variants = [Variant(name, (*_COMMON, *flags)) for name, flags in _FLAGS.items()]
    if count > len(variants):
        train(folder / "pretrained")
        fine_tuned = (*_COMMON, f"train.init_from={folder}/pretrained")
        variants.append(Variant("fine-tuning", fine_tuned))
    return variants


def _kill(faults: Faults, run: Run) -> tuple[str, str | None, str]:
    def kill_at(below: Path, num_calls: int) -> str:
        """Kill it at a random one of its calls; return that call, or "" if it has ended before."""
        first = run.draw.randint(1, num_calls)
        variables = faults.variables(below, first, action=SIGNAL, number=signal.SIGKILL)
        with run.start(variables) as (process,):
            process.wait()
        return faults.read_calls(below)[1]

    checkpoints = run.workdir / "checkpoints"
    if run.is_cold:
        call, kind = kill_at(run.workdir.with_name("programs"), _COMPILE_CALLS), "while compiling"
    else:
        call = kill_at(run.workdir.parent, faults.read_calls(run.alone)[0])
        kind = "inside a save" if f"run/{checkpoints.name}/" in call else "between saves"
    if run.number % 10 == 1 and CheckpointFolder(str(run.workdir)).steps():
        call, kind = kill_at(checkpoints, _RESTORE_CALLS), "inside a restore"
    return f"killed in {call or 'no call'}", None, kind if call else _NOT_REACHED


def _interrupt(run: Run) -> tuple[str, str | None, str]:
    """Send a signal, or two soon after each other, and wait for the run's end."""
    workdir, draw, is_twice = run.workdir, run.draw, run.number % 3 == 0
    sent = draw.choice([signal.SIGTERM, signal.SIGINT])
    began = time.monotonic()
    with run.start({}) as (process,):
        when = wait_for_a_moment(workdir, [process], draw, 0 if run.is_cold else None)
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
    kind += " while compiling" if run.is_cold and not steps else ""
    return f"{kind}, sent {when}, code {code} after {took}", problem, kind


def _recorded_steps(workdir: Path) -> int:
    """Last step in the metrics of a run; 0 before the first one."""
    rows = read_metrics(str(workdir))
    return max((row["step"] for row in rows if row["kind"] == "train"), default=0)


def _fail(faults: Faults, run: Run, seed: int) -> tuple[str, str | None, str]:
    """Let calls of a run that write fail, and check how it ends."""
    draw, above, num_calls = run.draw, run.workdir.parent, faults.read_calls(run.alone)[0]
    # No call is drawn twice before each has been drawn once.
    numbers = random.Random(seed).sample(range(num_calls), num_calls)
    first = 1 + numbers[run.number % num_calls]
    fails, error = draw.choice([1, draw.randint(2, 30), ALL]), draw.choice(_ERRORS)
    with run.start(faults.variables(above, first, fails, number=error)) as (process,):
        code = exit_code(process, _FAILS_WITHIN)
    call, log = faults.read_calls(above)[1], log_of(run.workdir)
    kind = {1: "one call", ALL: "all from one on"}.get(fails, "some calls")
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
        corruption = checkpoints.find_corruption(step)
        if corruption is not None:
            return f"the checkpoint of step {step} is corrupted: {corruption}"
    return None
