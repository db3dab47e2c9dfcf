"""Measure speed and memory beside baselines and the machine's own ceiling, in one run.

    python scripts/benchmark.py ops [train decode startup memory scaling serve] [--out FOLDER]
    python scripts/benchmark.py attention --out FOLDER [--quick]

    ops        the recurrence, forward and backward, beside scan
    train      train steps, beside other implementations of the model
    decode     time per generated token, beside recomputing the prefix
    startup    imports, and the first train step with and without a compilation cache
    memory     of a train step against the length of its sequence
    serve      the server under load, beside generation in process
    scaling    the techniques to scale training, A to F, and their effects
    attention  SimpleRNN against self-attention in six aspects, as a table with pictures;
               --quick measures small sizes, --only a part of it

Candidates run in alternating blocks of one process (A B A B ...), compiled and warmed up; the
first call of every block is dropped. Times are medians; a ratio is the median over blocks.
"""

import bootstrap

if __name__ == "__main__":
    bootstrap.start()

import itertools
import json
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from absl import flags
from simplernn_jax.benchmarks import (
    decoding,
    measure,
    memory,
    recurrence,
    scaling,
    serving,
    startup,
    tables,
    training,
)
from simplernn_jax.benchmarks.attention import corpus, report, resources, synthetic

from simplernn_jax import command_line, process_start
from simplernn_jax.devices import check_devices
from simplernn_jax.errors import UserError, nearest_name
from simplernn_jax.files import check_output, write_file

BENCHMARKS = {
    "ops": recurrence.run,
    "train": training.run,
    "decode": decoding.run,
    "startup": startup.run,
    "memory": memory.run,
    "scaling": scaling.run,
    "serve": serving.run,
}
MEASUREMENTS = {
    "parallelism": resources.measure_parallelism,
    "recall": synthetic.measure_recall,
    "distance": synthetic.measure_distance,
    "memory": resources.measure_memory,
    "cost": resources.measure_cost,
    "communication": resources.measure_communication,
    "corpus": corpus.measure_corpus,
    "interpretability": corpus.measure_interpretability,
}
"""Of attention, in the order of their aspects in its table."""
ATTENTION = "attention"
"""Has a folder of results to itself, and sizes instead of an effort."""

_ARGUMENTS = command_line.define_arguments(" ".join([*BENCHMARKS, ATTENTION]))
_OUT = flags.DEFINE_string("out", None, "Folder of results.json and the pictures.")
_QUICK = flags.DEFINE_bool("quick", False, "Small sizes of attention.")
_ONLY = flags.DEFINE_list(
    "only",
    list(MEASUREMENTS),
    "Measurements of attention; the others are taken from the results in the folder.",
)
_BLOCKS = flags.DEFINE_integer("blocks", 5, "Alternating blocks.", lower_bound=1)
_CALLS = flags.DEFINE_integer("calls", 4, "Timed calls per block and candidate.", lower_bound=1)


def main() -> int:
    """Run the benchmarks that the arguments name, in this order."""
    process_start.raise_on_signals()  # there are temporary folders and children
    names, known = _ARGUMENTS.value, [*BENCHMARKS, ATTENTION]
    if not names:
        raise UserError(f"name a benchmark: python scripts/benchmark.py {'|'.join(known)}")
    _check_names(names, known, "benchmark")
    _check_names(_ONLY.value or [""], MEASUREMENTS, "measurement")
    if ATTENTION in names and (len(names) > 1 or not _OUT.value):
        raise UserError(f"{ATTENTION}: name its folder, --out; measure the others without it")
    for flag in (_BLOCKS, _CALLS) if ATTENTION in names else (_QUICK, _ONLY):
        if flag.present:
            raise UserError(f"--{flag.name}: not of {names[0]}; see --help")
    out = Path(command_line.expand_path(_OUT.value, "out")) if _OUT.value else None
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        check_output(out / "results.json")  # before minutes of work
    check_devices()
    if out is not None and ATTENTION in names:
        report.run(MEASUREMENTS, out, _QUICK.value, _ONLY.value)
        return 0
    effort = measure.Effort(_BLOCKS.value, _CALLS.value)
    results: dict[str, Any] = {"machine": measure.describe_machine()}
    for title, rows in itertools.chain.from_iterable(BENCHMARKS[name](effort) for name in names):
        print(f"\n{title}\n\n{tables.markdown(rows)}", flush=True)
        results[title] = rows
        if out is not None:  # after each, so that a later failure loses nothing
            write_file(out / "results.json", (json.dumps(results, indent=2) + "\n").encode())
            for module in (memory, serving):
                if title == module.TITLE:
                    name = module.__name__.rpartition(".")[2]
                    write_file(out / f"{name}.png", module.draw(rows))
    return 0


def _check_names(names: Iterable[str], known: Collection[str], kind: str) -> None:
    for name in names:
        if name not in known:
            near = nearest_name(name, known)
            raise UserError(f"{name!r}: no such {kind}{near}; there are {', '.join(known)}")


if __name__ == "__main__":
    command_line.run(main)
