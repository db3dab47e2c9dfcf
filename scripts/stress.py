"""Try to break what this project promises, and report what failed.

    python scripts/stress.py kill corruption -n 20
    python scripts/stress.py quick
    python scripts/stress.py all --seed 1 --out reliability.md

Each experiment injects faults and checks a promise; docs/reliability.md lists them. Cases follow
from the seed. ``quick`` runs a few cases of most experiments, in minutes, ``all`` all of them, for
hours; an experiment named alone runs all of its cases too, unless -n is given.

Needs the packages of the extra ``test``. Exits with code 1 if any case failed.
"""

import bootstrap

if __name__ == "__main__":
    bootstrap.start()

import importlib.util
import tempfile
from pathlib import Path

from absl import flags

from benchmarks import stress, tables
from benchmarks.stress import corruption, edits, faults, fuzz, lookup, non_finite, soak
from simplernn_jax.cli import command_line, process_start
from simplernn_jax.errors import UserError
from simplernn_jax.files import write_file

EXPERIMENTS = {
    "kill": stress.Experiment(faults.kill, full=500, quick=2),
    "full_disk": stress.Experiment(faults.full_disk, full=600, quick=2),
    "hosts": stress.Experiment(faults.hosts, full=100, quick=0),
    "resume": stress.Experiment(faults.resume, full=18 * 59, quick=2),
    "corruption": stress.Experiment(corruption.corruption, full=5000, quick=24),
    "stores": stress.Experiment(corruption.stores, full=1200, quick=60),
    "edits": stress.Experiment(edits.edits, full=10_000, quick=0),
    "fuzz": stress.Experiment(fuzz.fuzz, full=10_000, quick=1000),
    "non_finite": stress.Experiment(non_finite.non_finite, full=500, quick=4),
    "lookup": stress.Experiment(lookup.lookup, full=10_000, quick=0),
    "soak": stress.Experiment(soak.soak, full=100, quick=1),
}

_ARGUMENTS = command_line.Arguments("|".join([*EXPERIMENTS, "quick", "all"]))
_COUNT = flags.DEFINE_integer(
    "n",
    None,
    "Cases of each experiment; by default all (hours), or the few of quick.",
    lower_bound=1,
)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the cases.", lower_bound=0)
_OUT = flags.DEFINE_string("out", None, "Markdown file for a table of the outcomes.")


def main() -> int:
    """Run the experiments that the arguments name; 1 if any case failed."""
    process_start.raise_on_signals()  # there are temporary folders and children
    names = _ARGUMENTS.value
    chosen = names
    if names in (["quick"], ["all"]):
        chosen = [name for name, each in EXPERIMENTS.items() if each.quick or names == ["all"]]
    if not chosen or not set(chosen) <= EXPERIMENTS.keys():
        raise UserError(f"name experiments, quick or all; there are {', '.join(EXPERIMENTS)}")
    if importlib.util.find_spec("uvicorn") is None:  # of `soak`
        raise UserError("uvicorn is not installed; run: pip install -e '.[test]'")
    rows: list[tables.Row] = []
    with tempfile.TemporaryDirectory(prefix="stress-") as folder:
        for name in dict.fromkeys(chosen):
            experiment = EXPERIMENTS[name]
            count = _COUNT.value or (experiment.quick if names == ["quick"] else experiment.full)
            rows.append(
                stress.run_experiment(name, experiment, Path(folder, name), count, _SEED.value)
            )
            if _OUT.value is not None:  # after each, since all of them take hours
                write_file(_OUT.value, tables.markdown(rows).encode())
    return int(any(row["failed"] for row in rows))


if __name__ == "__main__":
    command_line.run(main)
