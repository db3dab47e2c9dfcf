"""Runs that are killed, or in which a call that writes fails, and that resume."""

import errno
import os
import random
import shlex
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

from simplernn_jax.checkpoint.folder import CheckpointFolder, find_corruption

from .experiment import Case
from .runs import Run, Variant, disturb_runs, exit_code, log_of

ALL = 10**9
"""More calls than any run has."""
FAIL, SIGNAL = "fs"
"""Actions; their numbers are an errno and a signal. See ``faults.c``."""
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


_FAILS_WITHIN = 120.0
"""Seconds in which a run must end whose calls fail."""
_RESTORE_CALLS, _COMPILE_CALLS = 120, 90
"""Approximate number of calls that read a checkpoint, and that read and write compiled programs."""
_ERRORS = (errno.ENOSPC, errno.EIO, errno.EDQUOT)
_NOT_REACHED = "not reached"
"""Kind of the runs that end before the call with a fault: threads vary the number of calls."""

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


def kill(folder: Path, count: int, seed: int) -> Iterator[Case]:
    """A run killed at a random moment and resumed ends with the same bytes.

    SIGKILL comes with a random call that opens, writes or deletes a file: nothing else changes what
    is on the disk. One run in ten is killed once more, while it reads its checkpoint, and one in
    ten while it reads or writes compiled programs.
    """
    faults = Faults(folder)
    variants = [Variant(name, flags) for name, flags in _FLAGS.items()]
    return disturb_runs(
        *(folder, count, seed, variants),
        lambda run: _kill(faults, run),
        is_cold=lambda number: number % 10 == 3,
        alone=lambda above: faults.variables(above, action=SIGNAL),
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
        corruption = find_corruption(checkpoints.step_path(step))
        if corruption is not None:
            return f"the checkpoint of step {step} is corrupted: {corruption}"
    return None
