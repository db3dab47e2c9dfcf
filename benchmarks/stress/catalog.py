"""All experiments, by name."""

from . import (
    damage,
    determinism,
    full_disk,
    fuzz,
    fuzz_scripts,
    hosts,
    kill,
    non_finite,
    numerics,
    resume,
    soak,
    stores,
)
from .experiment import Experiment

EXPERIMENTS = {
    "kill": Experiment(
        "a run killed at a random moment and resumed ends with the same bytes",
        kill.kill,
        full=500,
        quick=2,
    ),
    "signals": Experiment(
        "a run that gets SIGTERM or SIGINT saves, exits, and resumes to the same bytes",
        kill.signals,
        full=200,
        quick=2,
    ),
    "hosts": Experiment(
        "when a process is lost or cut off the others exit, and all resume to the same bytes",
        hosts.hosts,
        full=100,
        quick=1,
    ),
    "resume": Experiment(
        "a run resumed at any step, in any batch mode, ends with the same bytes, on six meshes",
        resume.same_mesh,
        full=18 * 59,
        quick=4,
    ),
    "meshes": Experiment(
        "a run that resumes on another mesh ends with the same state but for rounding",
        resume.other_mesh,
        full=90,
        quick=1,
    ),
    "damage": Experiment(
        "damage to any files of a workdir is repaired, recovered from or refused in one line",
        damage.workdir,
        full=5000,
        quick=40,
    ),
    "stores": Experiment(
        "damage to token stores, decoder states, programs, exports and C code is never used",
        stores.stores,
        full=2000,
        quick=150,
    ),
    "numerics": Experiment(
        "results and gradients of the recurrence in float32 are within bounds of rounding errors",
        numerics.numerics,
        full=2000,
        quick=30,
    ),
    "non_finite": Experiment(
        "a step whose loss or gradient is not finite changes only counters; too many end the run",
        non_finite.non_finite,
        full=500,
        quick=4,
    ),
    "determinism": Experiment(
        "load, cores, threads, processes and hash seeds change no byte of a run",
        determinism.determinism,
        full=30,
        quick=2,
    ),
    "full_disk": Experiment(
        "a run in which any write fails ends in one line, and resumes to the same bytes",
        full_disk.full_disk,
        full=600,
        quick=3,
    ),
    "fuzz": Experiment(
        "any input to a reader of files, requests or arguments is accepted or refused in time",
        fuzz.fuzz,
        full=1_000_000,
        quick=8000,
        package="atheris",
    ),
    "scripts": Experiment(
        "any flag, argument or file of a script is accepted or refused in one line",
        fuzz_scripts.fuzz_scripts,
        full=2000,
        quick=2,
        package="uvicorn",
    ),
    "soak": Experiment(
        "long runs and servers need no more memory, files, threads or time per step",
        soak.soak,
        full=100,  # times 1,000 steps and 100 requests
        quick=2,
        package="uvicorn",
    ),
}
