"""Measure speed and memory, compared with baselines and the machine's peak throughput.

    python scripts/benchmark.py ops train --out FOLDER

docs/benchmarks.md has a command for each:

    ops        the recurrence, forward and backward, compared with scan
    train      train steps, compared with other implementations of the model
    decode     time per generated token, compared with recomputing the prefix
    lookup     decoding with drafts looked up in the text so far, by the trained model of --workdir
    startup    the first train step, with and without a compilation cache
    memory     memory of a train step against the length of its sequence
    sizes      memory and communication of a train step of small and gpt2_size on eight devices
    serve      the server under load, compared with generation in process
    scaling    the techniques to scale training, A to F, and their effects
    attention  SimpleRNN against self-attention in six aspects, as a table with plots;
               --quick measures small sizes, --only a part of it
    baselines  held-out loss of configurations, --configs, and of nanoGPT's architecture, an LSTM
               and a GRU, after each of --seconds of training
    completion the rest of a line at a cursor by runs of configs/complete.py, and the time of a
               keystroke
    minutes    held-out loss of the size of train.py --size=auto after --minutes of training, and of
               its neighbors
    tune       held-out loss of a state, low-rank updates and all parameters of --workdir after
               --seconds (15,60,240) on another author (--source) and language; 100 states served
    mixers     held-out loss of all mixers after --seconds (60) and after as many steps, recall,
               state tracking, and speed; --source for another text
    scoring    score.py: speed relative to prefill, and recall of 200 wrong tokens and lines in
               held-out files or logs of the runs in --workdirs

Except in attention and what follows it, candidates run in alternating blocks of one process,
compiled and warmed up. Times are medians, ratios medians over blocks. --out keeps tables of
earlier runs.
"""

import bootstrap

if __name__ == "__main__":
    bootstrap.start()

from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path

from absl import flags

from benchmarks import (
    completion,
    decoding,
    minutes,
    mixers,
    scaling,
    scoring,
    serving,
    training,
    tuning,
)
from benchmarks.attention import MEASUREMENTS, aspects
from benchmarks.baselines import report
from benchmarks.baselines.trainers import LABELS
from benchmarks.measure import Effort
from benchmarks.tables import Results, Table
from simplernn_jax.cli import command_line, config_files, process_start
from simplernn_jax.devices import check_devices
from simplernn_jax.errors import UserError, nearest_name

_OUT = flags.DEFINE_string("out", None, "Folder of results.json, table.md and the plots.")
_WORKDIR = flags.DEFINE_string("workdir", None, "lookup, tune: workdir of a trained model.")
_CORPUS = command_line.CorpusFlags()
_BLOCKS = flags.DEFINE_integer("blocks", 5, "Number of alternating blocks.", lower_bound=1)
_CALLS = flags.DEFINE_integer("calls", 4, "Timed calls per block and candidate.", lower_bound=1)
_QUICK = flags.DEFINE_bool("quick", False, "attention: use small sizes.")
_ONLY = flags.DEFINE_list(
    "only", list(MEASUREMENTS), f"attention: measurements, any of {', '.join(MEASUREMENTS)}."
)
_CONFIGS = flags.DEFINE_list("configs", ["base"], "baselines: such as tiny,shakespeare.")
_SOURCE = flags.DEFINE_string(
    "source", None, "baselines, minutes: text of all; mixers: another text; tune: of the author."
)
_SECONDS = flags.DEFINE_list(
    "seconds",
    ["0"],
    "baselines, mixers, tune: seconds each; 0: the steps of settings, or defaults.",
)
_SEEDS = flags.DEFINE_integer("seeds", 1, "baselines: number of seeds.", lower_bound=1)
_PROGRAMS = flags.DEFINE_list("programs", [], f"baselines: programs, any of {', '.join(LABELS)}.")
_RATE = flags.DEFINE_float("rate", None, "baselines: their peak learning rate.", lower_bound=1e-9)
_WORKDIRS = flags.DEFINE_list("workdirs", [], "completion, scoring: workdirs of trained models.")
_MINUTES = flags.DEFINE_list("minutes", ["1", "5", "30"], "minutes: minutes of training.")
BENCHMARKS: dict[str, Callable[[Effort, Results], Iterator[Table]]] = {
    "ops": lambda effort, _: training.run_ops(effort),
    "train": lambda effort, _: training.run_steps(effort),
    "decode": lambda effort, _: decoding.run(effort),
    "lookup": lambda effort, _: decoding.run_lookup(effort, _workdir(), _CORPUS.open),
    "serve": lambda effort, _: serving.run(effort),
    "startup": lambda effort, _: training.run_startup(effort),
    "memory": lambda *_: scaling.run_memory(),
    "scaling": lambda effort, _: scaling.run(effort),
    "sizes": lambda *_: scaling.run_sizes(),
    "attention": lambda _, results: aspects.run(
        MEASUREMENTS, _ONLY.value, _QUICK.value, results.tables
    ),
    "baselines": lambda _, results: report.run(_requests(), results.tables),
    "completion": lambda *_: completion.run(_WORKDIRS.value),
    "minutes": lambda _, results: minutes.run(_numbers(_MINUTES), _SOURCE.value, results.tables),
    "tune": lambda *_: tuning.run(_workdir(), _SOURCE.value, _numbers(_SECONDS)),
    "mixers": lambda effort, _: mixers.run(effort, _SOURCE.value, _numbers(_SECONDS)),
    "scoring": lambda effort, _: scoring.run(_WORKDIRS.value, effort),
}
_ARGUMENTS = command_line.Arguments(" ".join(BENCHMARKS))


def main() -> int:
    """Run the benchmarks that the arguments name, in this order."""
    process_start.raise_on_signals()  # there are temporary folders and children
    names = _ARGUMENTS.value
    if not names:
        raise UserError(f"name a benchmark: python scripts/benchmark.py {'|'.join(BENCHMARKS)}")
    check_names(names, BENCHMARKS, "benchmark")
    check_names(_ONLY.value, MEASUREMENTS, "measurement")
    check_names(_CONFIGS.value, config_files.config_names(), "configuration")
    check_names(_PROGRAMS.value, LABELS, "program")
    results = Results(Path(command_line.expand_path(_OUT.value, "out")) if _OUT.value else None)
    check_devices()
    for name in dict.fromkeys(names):
        for table in BENCHMARKS[name](Effort(_BLOCKS.value, _CALLS.value), results):
            results.add(table)  # one by one, so that a later failure loses nothing
    return 0


def _workdir() -> str:
    if not _WORKDIR.value:
        raise UserError("no --workdir: specify a trained model, such as runs/base")
    return command_line.expand_path(_WORKDIR.value, "workdir")


def _numbers(flag: flags.FlagHolder[list[str]]) -> list[float]:
    try:
        numbers = [float(value) for value in flag.value]
    except ValueError as error:
        raise UserError(f"--{flag.name}: {error}; list numbers, such as 1,5") from error
    if not all(0 < number < 1e6 for number in numbers) and numbers != [0]:
        raise UserError(f"--{flag.name}={','.join(flag.value)}: must be above 0, and below 1e6")
    return numbers


def _requests() -> list[report.Request]:
    programs = _SEEDS.value, _PROGRAMS.value, _RATE.value
    return report.make_requests(_CONFIGS.value, _SOURCE.value, _numbers(_SECONDS), *programs)


def check_names(names: Iterable[str], known: Collection[str], kind: str) -> None:
    """Reject a name that is unknown."""
    for name in names:
        if name not in known:
            near = nearest_name(name, known)
            raise UserError(f"{name!r}: no such {kind}{near}; there are {', '.join(known)}")


if __name__ == "__main__":
    command_line.run(main)
