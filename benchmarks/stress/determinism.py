"""The same run under another load, on other cores, in another process, with other threads."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from .experiment import Case, experiment
from .runs import Run, Variant, disturb_runs

_STEPS = ("train.steps=6", "train.save_every=6")
_WIDE = [f"model.{field}=128" for field in ("hidden_dim", "key_dim", "value_dim")]
_LARGE = ("model.mlp_dim=512", "data.batch_size=16", "data.sequence_length=128")
VARIANTS = [
    # Matmuls and reductions that XLA divides among threads.
    Variant("wide", (*_STEPS, *_WIDE, *_LARGE)),
    Variant(
        "gla",
        (*_STEPS, *_WIDE, "model.block=swiglu", "model.mixer=gla", "model.precision=bfloat16"),
    ),
    Variant("dropout", (*_STEPS, "model.dropout=0.2", "data.mode=window")),
    Variant("Muon", (*_STEPS, "optimizer.name=muon", "model.mixer=simple_rnn,attention")),
]
_BUSY_LOOP = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: pass"
"""Also ends if its parent is killed."""


@experiment(full=30, quick=2)
def determinism(folder: Path, count: int, seed: int) -> Iterator[Case]:
    """Load, cores, threads, processes and hash seeds change no byte of a run.

    Half of the runs have 2 threads, as those that they are compared with, the others 1, 4 or 8.
    Runs with other threads, for which XLA compiles other programs, and every fourth one compile.
    """
    return disturb_runs(
        *(folder, count, seed, VARIANTS, _vary),
        is_cold=lambda number: _has_other_threads(number) or number % 4 == 0,
        alone=lambda above: {"NPROC": "2"},
        resumes=False,
    )


def _has_other_threads(number: int) -> bool:
    return (number + number // len(VARIANTS)) % 2 == 1


def _vary(run: Run) -> tuple[str, str | None, str]:
    draw = run.draw
    threads = draw.choice([1, 4, 8]) if _has_other_threads(run.number) else 2
    num_cores, is_loaded = draw.randint(1, 2), draw.random() < 0.5
    # XLA's thread pool, which the C functions share, follows NPROC, else the process's cores.
    variables = {"NPROC": str(threads), "PYTHONHASHSEED": str(draw.randrange(1, 2**32))}
    with contextlib.ExitStack() as stack:
        if sys.platform == "linux":  # cores of this thread, and of the processes that it starts
            cores = os.sched_getaffinity(0)
            stack.callback(os.sched_setaffinity, 0, cores)
            os.sched_setaffinity(0, sorted(cores)[:num_cores])
        for _ in range(num_cores if is_loaded else 0):
            loop = stack.enter_context(subprocess.Popen([sys.executable, "-c", _BUSY_LOOP]))
            stack.callback(loop.kill)
        (process,) = stack.enter_context(run.start(variables))
        code = process.wait()
    what = f"{variables}, {num_cores} cores{', loaded' * is_loaded}{', compiled' * run.is_cold}"
    problem = f"code {code}" if code else None
    return what, problem, f"{threads} thread{'s' * (threads > 1)}"
