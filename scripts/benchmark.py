"""Measure speed and memory, compared with baselines and the machine's peak throughput.

    python scripts/benchmark.py ops [train decode serve startup memory scaling sizes]
    python scripts/benchmark.py attention --out FOLDER [--quick]
    python scripts/benchmark.py baselines --configs NAMES --out FOLDER [--seconds S[,S...]]
        [--programs NAMES] [--rates RATES] [--seeds N] [--source TEXT]

    ops        the recurrence, forward and backward, compared with scan
    train      train steps, compared with other implementations of the model
    decode     time per generated token, compared with recomputing the prefix
    startup    imports, and the first train step with and without a compilation cache
    memory     memory of a train step against the length of its sequence
    sizes      memory and communication of a train step of small and gpt2_size on eight devices
    serve      the server under load, compared with generation in process
    scaling    the techniques to scale training, A to F, and their effects
    attention  SimpleRNN against self-attention in six aspects, as a table with plots;
               --quick measures small sizes, --only a part of it
    baselines  held-out loss against training time of configurations, --configs, and of nanoGPT's
               architecture, an LSTM and a GRU, for --seconds each

Except in attention and baselines, candidates run in alternating blocks of one process
(A B A B ...), compiled and warmed up; the first call of every block is dropped. Times are medians;
a ratio is the median over blocks. Tables that --out has from earlier runs stay there.
"""

import bootstrap

if __name__ == "__main__":
    bootstrap.start()

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from absl import flags

from benchmarks import decoding, recurrence, scaling, serving, sizes, startup, training
from benchmarks.attention import MEASUREMENTS, aspects
from benchmarks.baselines import report
from benchmarks.baselines.programs import LOOKS
from benchmarks.measure import Effort
from benchmarks.tables import Results, Table
from simplernn_jax.cli import command_line, config_files, process_start
from simplernn_jax.devices import check_devices
from simplernn_jax.errors import UserError, nearest_name

COMPARISONS: dict[str, Callable[[Effort], Iterator[Table]]] = {
    "ops": recurrence.run,
    "train": training.run,
    "decode": decoding.run,
    "startup": startup.run,
    "memory": lambda _: sizes.run_memory(),
    "scaling": scaling.run,
    "serve": serving.run,
    "sizes": lambda _: sizes.run(),
}
ATTENTION, BASELINES = "attention", "baselines"
NAMES = (*COMPARISONS, ATTENTION, BASELINES)

_ARGUMENTS = command_line.define_arguments(" ".join(NAMES))
_OUT = flags.DEFINE_string("out", None, "Folder of results.json, table.md and the plots.")
_QUICK = flags.DEFINE_bool("quick", False, "attention: use small sizes.")
_ONLY = flags.DEFINE_list(
    "only", list(MEASUREMENTS), f"attention: measurements, any of {', '.join(MEASUREMENTS)}."
)
_CONFIGS = flags.DEFINE_list(
    "configs", ["base"], "baselines: configurations, such as tiny,shakespeare."
)
_SOURCE = flags.DEFINE_string(
    "source", None, "baselines: text, in place of that of every configuration."
)
_SECONDS = flags.DEFINE_list(
    "seconds",
    ["0"],
    "baselines: seconds of training per program, one number or one for each configuration; 0: the "
    "steps of its settings.",
)
_SEEDS = flags.DEFINE_integer("seeds", 1, "baselines: number of seeds.", lower_bound=1)
_PROGRAMS = flags.DEFINE_list(
    "programs", [], f"baselines: programs to train, any of {', '.join(LOOKS)}."
)
_RATES = flags.DEFINE_list(
    "rates",
    [],
    "baselines: peak learning rates to try for every baseline; a single one is used as it is.",
)
_BLOCKS = flags.DEFINE_integer("blocks", 5, "Number of alternating blocks.", lower_bound=1)
_CALLS = flags.DEFINE_integer("calls", 4, "Timed calls per block and candidate.", lower_bound=1)
OF_COMPARISONS = (_BLOCKS, _CALLS)
OF_BASELINES = (_CONFIGS, _SOURCE, _SECONDS, _SEEDS, _PROGRAMS, _RATES)
OWN_FLAGS: dict[str, tuple[flags.FlagHolder[Any], ...]] = {
    **dict.fromkeys(COMPARISONS, OF_COMPARISONS),
    ATTENTION: (_QUICK, _ONLY),
    BASELINES: OF_BASELINES,
}
"""Flags of each benchmark, except --out."""


def main() -> int:
    """Run the benchmarks that the arguments name, in this order."""
    process_start.raise_on_signals()  # there are temporary folders and children
    names = _ARGUMENTS.value
    if not names:
        raise UserError(f"name a benchmark: python scripts/benchmark.py {'|'.join(NAMES)}")
    _check_names(names, NAMES, "benchmark")
    _check_names(_ONLY.value or [""], MEASUREMENTS, "measurement")
    _check_names(_PROGRAMS.value, LOOKS, "program")
    _check_names(_CONFIGS.value, config_files.config_names(), "configuration")
    own = {flag.name for name in names for flag in OWN_FLAGS[name]}
    for flag in itertools.chain(*OWN_FLAGS.values()):
        if flag.present and flag.name not in own:
            raise UserError(f"--{flag.name}: not of {names[0]}; see --help")
    results = Results(Path(command_line.expand_path(_OUT.value, "out")) if _OUT.value else None)
    check_devices()
    effort = Effort(_BLOCKS.value, _CALLS.value)
    for name in names:
        if name == ATTENTION:
            tables = aspects.run(MEASUREMENTS, _ONLY.value, _QUICK.value, results.tables)
        elif name == BASELINES:
            requests = report.make_requests(*(flag.value for flag in OF_BASELINES))
            tables = report.run(requests, results)
        else:
            tables = COMPARISONS[name](effort)
        for table in tables:  # written one by one, so that a later failure loses nothing
            results.add(table)
    return 0


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
