"""Runs in which a call that writes to the disk fails."""

import errno
import random
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from simplernn_jax.checkpoint.folder import CheckpointFolder

from . import preload
from .experiment import Case
from .runs import PARALLEL, difference, exit_code, log_of, read_checkpoint, resume, start_run, train

FLAGS = ("--config.model.num_layers=1", "--config.train.steps=9", "--config.train.eval_every=3")
"""Three saves: with the third, the first is deleted."""
ERRORS = (errno.ENOSPC, errno.EIO, errno.EDQUOT)
WITHIN = 120.0
"""Seconds in which a run must end."""
_ALL = 10**9
_NOT_REACHED = "not reached"
"""Kind of the runs that end before the call that would fail: threads vary the number of calls."""


def full_disk(folder: Path, count: int, seed: int) -> Iterator[Case]:
    """Let each call of a run that writes fail: alone, with some that follow, or with all of them.

    Calls are counted below a folder that holds the tokenized text and the workdir, and in every
    tenth run also the compiled programs, which all other runs share. No call is drawn twice before
    each has been drawn once.
    """
    library = preload.build("failing_writes", folder)
    alone = folder / "alone" / "run"
    alone.parent.mkdir()
    train(alone, flags=FLAGS, environment=_environment(alone, library))
    expected, num_calls = read_checkpoint(alone), preload.read_calls(_record(alone))[0]
    print(f"full_disk: {num_calls} calls of the run write", flush=True)
    numbers = random.Random(seed).sample(range(num_calls), num_calls)

    def run_case(number: int) -> Case:
        workdir = folder / str(number) / "run"
        workdir.parent.mkdir()
        draw = random.Random(f"{seed} {number}")
        first = 1 + numbers[number % num_calls]
        fails = draw.choice([1, draw.randint(2, 30), _ALL])
        error = draw.choice(ERRORS)
        is_cold = number % 10 == 9
        environment = _environment(workdir, library, first, fails, error, is_cold)
        kind = {1: "one call", _ALL: "all from one on"}.get(fails, "some calls")
        what, problem = _run_and_resume(workdir, environment, expected)
        if what.startswith(_NOT_REACHED):
            kind = _NOT_REACHED
        shutil.rmtree(workdir.parent)
        name = errno.errorcode[error]
        description = f"run {number}, {name} in call {first} of {num_calls}, {kind}, {what}"
        return Case(description, problem, kind)

    with ThreadPoolExecutor(PARALLEL) as pool:
        yield from pool.map(run_case, range(count))


def _run_and_resume(
    workdir: Path, environment: dict[str, str], expected: dict[str, Any]
) -> tuple[str, str | None]:
    """Return what a run was doing when a call failed, and what is wrong with it."""
    with start_run(workdir, 1, FLAGS, environment) as (process,):
        code = exit_code(process, WITHIN)
    log = log_of(workdir)
    failed = preload.read_calls(_record(workdir))[1]
    what = f"{failed or _NOT_REACHED}, code {code}"
    if code is None:
        return what, f"has not ended within {WITHIN:.0f} s: {log[-500:]}"
    errors = [line for line in log.splitlines() if line.startswith("error: ")]
    if code not in (0, 2) or len(errors) != (code == 2) or "Traceback" in log:
        return what, f"code {code}, {len(errors)} errors: {log[-2000:]}"
    checkpoints = CheckpointFolder(str(workdir))
    for step in checkpoints.steps():
        corruption = checkpoints.find_corruption(step)
        if corruption is not None:
            return what, f"the checkpoint of step {step} is corrupted: {corruption}"
    if code == 0:
        problem = difference(read_checkpoint(workdir), expected)
        if problem is not None:
            return what, f"without an error, {problem}"
    problem = resume(workdir, expected, flags=FLAGS, environment=environment | {"LD_PRELOAD": ""})
    left = [path.name for path in workdir.parent.rglob("*tmp*")]
    if problem is None and left:
        problem = f"left behind: {', '.join(left)}"
    return what, problem


def _environment(
    workdir: Path,
    library: Path,
    first: int = _ALL,
    count: int = 1,
    error: int = 0,
    is_cold: bool = False,
) -> dict[str, str]:
    """Variables of a run whose `first` call that writes fails, and `count` - 1 that follow."""
    programs = workdir.parent if is_cold else workdir.parent.parent
    variables = preload.failing_writes(
        library, _record(workdir), workdir.parent, first, count, error
    )
    return variables | {"JAX_COMPILATION_CACHE_DIR": str(programs / "programs")}


def _record(workdir: Path) -> Path:
    return workdir.parent.with_suffix(".calls")
