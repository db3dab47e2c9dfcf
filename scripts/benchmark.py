"""Measure speed and memory beside baselines and the machine's peak throughput, in one run.

    python scripts/benchmark.py ops [train decode serve startup memory scaling sizes growth]
    python scripts/benchmark.py attention --out FOLDER [--quick]
    python scripts/benchmark.py ladder --rungs NAMES --out FOLDER [--seconds S[,S...]]
        [--programs NAMES] [--rates RATES] [--seeds N] [--source TEXT]

    ops        the recurrence, forward and backward, beside scan
    train      train steps, beside other implementations of the model
    decode     time per generated token, beside recomputing the prefix
    startup    imports, and the first train step with and without a compilation cache
    memory     memory of a train step against the length of its sequence
    sizes      memory and communication of a train step of small and gpt2_size on eight devices
    serve      the server under load, beside generation in process
    scaling    the techniques to scale training, A to F, and their effects
    growth     time and memory against parameters, length, batch, corpus and devices, with slopes;
               --largest_corpus sets the largest text
    attention  SimpleRNN against self-attention in six aspects, as a table with plots;
               --quick measures small sizes, --only a part of it
    ladder     held-out loss against training time of configurations, --rungs, and of their
               peers: nanoGPT's architecture, an LSTM and a GRU, for --seconds each

Except in attention, ladder and growth, candidates run in alternating blocks of one process
(A B A B ...), compiled and warmed up; the first call of every block is dropped. Times are medians;
a ratio is the median over blocks.
"""

import bootstrap

if __name__ == "__main__":
    bootstrap.start()

import functools
import itertools
import json
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from absl import flags

from benchmarks import (
    decoding,
    growth,
    measure,
    memory,
    recurrence,
    scaling,
    serving,
    sizes,
    startup,
    tables,
    training,
)
from benchmarks.attention import corpus, report, resources, synthetic
from benchmarks.ladder import peers, requests
from benchmarks.ladder import report as ladder
from simplernn_jax import command_line, process_start
from simplernn_jax.config_files import config_names
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
    "sizes": sizes.run,
    "growth": growth.run,
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
"""Measurements of attention, in the order of their aspects in its table."""
ATTENTION, LADDER = ALONE = "attention", "ladder"
"""Have a folder of results to themselves, and other flags than an effort."""

_ARGUMENTS = command_line.define_arguments(" ".join([*BENCHMARKS, *ALONE]))
_OUT = flags.DEFINE_string("out", None, "Folder of results.json and the plots.")
_QUICK = flags.DEFINE_bool("quick", False, "attention: use small sizes.")
_ONLY = flags.DEFINE_list(
    "only",
    list(MEASUREMENTS),
    "attention: measurements to run; the others are taken from the results in the folder.",
)
_RUNGS = flags.DEFINE_list("rungs", ["base"], "ladder: configurations, such as tiny,shakespeare.")
_SOURCE = flags.DEFINE_string("source", None, "ladder: text, in place of that of every rung.")
_SECONDS = flags.DEFINE_list(
    "seconds",
    ["0"],
    "ladder: seconds of training per program, one number or one for each rung; 0: the steps of its "
    "settings.",
)
_SEEDS = flags.DEFINE_integer("seeds", 1, "ladder: number of seeds.", lower_bound=1)
_PROGRAMS = flags.DEFINE_list(
    "programs", [], f"ladder: programs to train, any of {', '.join(peers.known_names())}."
)
_RATES = flags.DEFINE_list(
    "rates", [], "ladder: peak learning rates to try for every peer; a single one is used as it is."
)
_LARGEST_CORPUS = flags.DEFINE_integer(
    "largest_corpus",
    1000,
    "growth: MB of the largest text; it takes up to six times as much disk.",
    lower_bound=growth.SMALLEST_CORPUS,
)
_BLOCKS = flags.DEFINE_integer("blocks", 5, "Number of alternating blocks.", lower_bound=1)
_CALLS = flags.DEFINE_integer("calls", 4, "Timed calls per block and candidate.", lower_bound=1)
EFFORT = _BLOCKS, _CALLS
"""Flags of all benchmarks but `ALONE`."""
FLAGS: dict[str, tuple[flags.FlagHolder[Any], ...]] = {
    ATTENTION: (_QUICK, _ONLY),
    LADDER: (_RUNGS, _SOURCE, _SECONDS, _SEEDS, _PROGRAMS, _RATES),
    "growth": (_LARGEST_CORPUS,),
}
"""Flags of one benchmark alone."""


def main() -> int:
    """Run the benchmarks that the arguments name, in this order."""
    process_start.raise_on_signals()  # there are temporary folders and children
    names, known = _ARGUMENTS.value, [*BENCHMARKS, *ALONE]
    if not names:
        raise UserError(f"name a benchmark: python scripts/benchmark.py {'|'.join(known)}")
    _check_names(names, known, "benchmark")
    _check_names(_ONLY.value or [""], MEASUREMENTS, "measurement")
    _check_names(_PROGRAMS.value, peers.known_names(), "program")
    _check_names(_RUNGS.value, config_names(), "configuration")
    for name in ALONE:
        if name in names and (len(names) > 1 or not _OUT.value):
            raise UserError(f"{name}: name its folder, --out; measure the others without it")
    _check_flags(names)
    out = Path(command_line.expand_path(_OUT.value, "out")) if _OUT.value else None
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        check_output(out / "results.json")  # before minutes of work
    check_devices()
    if out is not None and ATTENTION in names:
        report.run(MEASUREMENTS, out, _QUICK.value, _ONLY.value)
        return 0
    if out is not None and LADDER in names:
        fields = (flag.value for flag in FLAGS[LADDER])
        ladder.run(requests.make_requests(*fields), out)
        return 0
    effort = measure.Effort(_BLOCKS.value, _CALLS.value)
    sized = functools.partial(growth.run, largest_corpus=_LARGEST_CORPUS.value)
    runs = [sized if name == "growth" else BENCHMARKS[name] for name in names]
    results: dict[str, Any] = {"machine": measure.describe_machine()}
    for title, rows in itertools.chain.from_iterable(run(effort) for run in runs):
        print(f"\n{title}\n\n{tables.markdown(rows)}", flush=True)
        results[title] = rows
        if out is not None:  # after each, so that a later failure loses nothing
            write_file(out / "results.json", (json.dumps(results, indent=2) + "\n").encode())
            _draw(title, rows, out)
    return 0


def _draw(title: str, rows: list[tables.Row], out: Path) -> None:
    for module in (memory, serving):
        if title == module.TITLE:
            name = module.__name__.rpartition(".")[2]
            write_file(out / f"{name}.png", module.draw(rows))
    if title in growth.TITLES:
        name = f"growth_{growth.TITLES[title]}"
        write_file(out / f"{name}.png", growth.draw(title, rows))


def _check_flags(names: list[str]) -> None:
    own = {flag.name for name in names for flag in FLAGS.get(name, ())}
    if not set(names) & set(ALONE):
        own |= {flag.name for flag in EFFORT}
    for flag in itertools.chain(EFFORT, *FLAGS.values()):
        if flag.present and flag.name not in own:
            raise UserError(f"--{flag.name}: not of {names[0]}; see --help")


def _check_names(names: Iterable[str], known: Collection[str], kind: str) -> None:
    seen = set()
    for name in names:
        if name not in known:
            near = nearest_name(name, known)
            raise UserError(f"{name!r}: no such {kind}{near}; there are {', '.join(known)}")
        if name in seen:
            raise UserError(f"{name!r}: this {kind} is named twice; name it once")
        seen.add(name)


if __name__ == "__main__":
    command_line.run(main)
