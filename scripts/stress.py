"""Try to break the checkpoints of training runs, and report whether anything was lost.

    python scripts/stress.py kill|damage|hosts -n 20

``kill`` sends SIGKILL to a training run at a random moment, at least every second time inside a
save, runs the same command again to the end, and compares the last checkpoint byte for byte with
that of an uninterrupted run. ``damage`` flips a bit, truncates or deletes a file of the newest
checkpoint, and expects detection and the checkpoint before it. ``hosts`` kills or stops a random
one of two processes that train together at a random moment, expects the other to end soon with the
reason, and resumes and compares as ``kill`` does.

Exits with code 1 if anything was lost.
"""

import bootstrap

if __name__ == "__main__":
    bootstrap.start()

import tempfile
from pathlib import Path

from absl import flags
from simplernn_jax.benchmarks.stress import EXPERIMENTS

from simplernn_jax import command_line, process_start
from simplernn_jax.errors import UserError

_ARGUMENTS = command_line.define_arguments("|".join(EXPERIMENTS))
_COUNT = flags.DEFINE_integer("n", 20, "Number of runs to kill, or of damages.", lower_bound=1)


def main() -> int:
    """Run the experiment that the argument names; 1 if anything was lost."""
    process_start.raise_on_signals()  # there are temporary folders and children
    names = _ARGUMENTS.value
    if len(names) != 1 or names[0] not in EXPERIMENTS:
        raise UserError("name one: python scripts/stress.py kill, ... damage or ... hosts")
    with tempfile.TemporaryDirectory(prefix="stress-") as folder:
        return EXPERIMENTS[names[0]](Path(folder), _COUNT.value)


if __name__ == "__main__":
    command_line.run(main)
