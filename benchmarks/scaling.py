"""What techniques to scale training cost and save, and the sizes of large configurations.

`run` compares the techniques A to F with the same training without them. Every training is of the
same small model on the same number of tokens; the loss is measured on held-out text. A second seed
shows the noise. Devices of a mesh are simulated and share the cores, so that their tokens/s show
the cost of a schedule, not the gain from hardware.

`run_sizes` and `run_memory` compile train steps that do not run, for XLA's memory analysis for
CPUs. On a mesh the recurrence is chunkwise, as on GPUs, and bytes are those of the collectives'
results on one device, those of the loop over microbatches times their number.
"""

import copy
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from simplernn_jax.cli import config_files
from simplernn_jax.config import Config
from simplernn_jax.inference import generate, load_state, save_state

from .measure import Effort, alternate, median, on_simulated_devices
from .tables import Row, Table
from .train_steps import (
    Trained,
    change,
    collectives,
    compile_quickly,
    count_parameters,
    load_config,
    measure_on_corpus,
    megabytes,
    train_on_corpus,
    with_method,
)

BATCH, LENGTH, STEPS = 8, 256, 200
PREFIX = 4096
LONG = 4
"""Factor between long sequences and LENGTH; the batch is smaller by it."""
TECHNIQUES: tuple[tuple[str, str, Row], ...] = (
    ("baseline", "whole step compiled, fused recurrence", {}),
    ("second seed", "parameters and batches", {"seed": 1}),
    ("A sliding windows", "stride of half a window", {"stride": LENGTH // 2}),
    ("B pipeline parallelism", "2 devices, a layer each", {"pipeline": 2}),
    ("B sequence parallelism", "2 devices, half of each sequence", {"sequence": 2}),
    ("C one token at a time", "a compiled loop", {"mixer_options": {"method": "scan"}}),
    ("D bfloat16 matmuls", "operands", {"precision": "bfloat16"}),
    (
        "E truncated in a step",
        f"{LONG} windows long, gradient cut between windows",
        {"batch_size": BATCH // LONG, "sequence_length": LONG * LENGTH, "bptt_window": LENGTH},
    ),
)
"""Technique, change, and fields of the configuration or the seed."""


def run(effort: Effort) -> Iterator[Table]:
    """The table of the trainings, each of which runs once, and of a cached prefix."""
    with tempfile.TemporaryDirectory() as workdir:
        rows, trained = compare(small_run(), workdir)
        rows += cached_prefix(trained, workdir, effort)
    yield Table(f"scaling: 2 layers of width 64, {STEPS * BATCH * LENGTH:,} tokens", rows)


def small_run() -> Config:
    """Two residual layers of width 64 on windows of the default corpus."""
    config = load_config("tiny", BATCH, LENGTH, steps=STEPS, eval_tokens=65536)
    config.model.vocab_size = 260  # even, so that a mesh can divide it
    change(config, hidden_dim=64, key_dim=64, value_dim=64, mlp_dim=256)
    return change(config, learning_rate=1e-2, warmup_steps=50, gradient_accumulation=1)


def compare(base: Config, workdir: str) -> tuple[list[Row], Trained]:
    """Train with every technique; return the rows of the table, and the baseline's training."""
    rows: list[Row] = []
    runs: list[Trained] = []
    for technique, what, given in TECHNIQUES:
        fields = {name: value for name, value in given.items() if name != "seed"}
        config = change(copy.deepcopy(base), **fields)
        if fields.keys() & {"pipeline", "sequence"}:
            measured = on_simulated_devices(2, measure_on_corpus, config=config, workdir=workdir)
        else:
            runs.append(train_on_corpus(config, workdir, seed=given.get("seed", 0)))
            measured = runs[-1].measured
        rows.append({"technique": technique, "change": what} | measured)
    for row in rows[1:]:
        row["difference"] = row["nats/token"] - rows[0]["nats/token"]
    return rows, runs[0]


def cached_prefix(trained: Trained, workdir: str, effort: Effort) -> list[Row]:
    """Time the first token after a prefix, prefilled and from its saved state."""
    model, tokenizer = trained.model(), trained.corpus.tokenizer
    text = np.asarray(trained.corpus.train.tokens[:PREFIX], np.int32).tolist()
    path = os.path.join(workdir, "prefix.state")
    save_state(path, generate(model, [text], max_new_tokens=0).state, model, tokenizer)

    def prefill() -> Any:
        return generate(model, [text], max_new_tokens=1).tokens

    def load() -> Any:
        return generate(model, state=load_state(path, model, tokenizer), max_new_tokens=1).tokens

    if not np.array_equal(prefill(), load()):
        raise RuntimeError("a loaded state continues with another token than its text")
    size = f"state of {os.path.getsize(path) / 1e3:.0f} kB loaded"
    calls = {f"{len(text):,} tokens prefilled": prefill, size: load}
    return [
        {"technique": "F cached prefix", "change": f"{what}: {1e3 * median(blocks):.1f} ms"}
        for what, blocks in alternate(calls, effort).items()
    ]


DEVICES = 8
NAMES = ("small", "gpt2_size")
MESHES: tuple[Mapping[str, int], ...] = ({"data": 8}, {"fsdp": 8}, {"tensor": 4, "fsdp": 2})
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{\n((?:  .*\n)*)", re.MULTILINE)


def run_sizes() -> Iterator[Table]:
    """The table of `NAMES` on `MESHES`."""
    rows: list[Row] = []
    for name in NAMES:
        config = config_files.load_config(name)
        for sizes in MESHES:
            change(config, **{"data": 1, "fsdp": 1, "tensor": 1} | dict(sizes))
            measured = on_simulated_devices(DEVICES, measure_step, config=config)
            mesh = ", ".join(f"{axis} {size}" for axis, size in sizes.items())
            rows.append({"configuration": name, "mesh": mesh} | measured)
    yield Table("sizes: a train step on 8 devices, MB of one device", rows)


def measure_step(config: Config) -> Row:
    """Sizes of the train step of `config` on one device; for `on_simulated_devices`."""
    program = compile_quickly(with_method(config, "chunkwise"))
    memory, exchanged = program.memory_analysis(), bytes_by_kind(program.as_text(), config)
    row: Row = {
        "parameters": count_parameters(config),
        "sequences": f"{config.data.batch_size:,} of {config.data.sequence_length:,}",
        "microbatches": config.train.gradient_accumulation or 1,
        "state and batch": memory.argument_size_in_bytes / 1e6,
        "working memory": memory.temp_size_in_bytes / 1e6,
    }
    kinds = ("all-reduce", "all-gather", "reduce-scatter")
    others = exchanged.keys() - set(kinds)
    return row | {kind: exchanged[kind] / 1e6 for kind in [*kinds, *sorted(others)]}


def bytes_by_kind(text: str, config: Config) -> Counter[str]:
    """Bytes of the results of all collectives of one step, by kind.

    The only loop with collectives is that over microbatches, without BPTT windows and shards of
    time.
    """
    repeats = (config.train.gradient_accumulation or 1) - 1
    exchanged: Counter[str] = Counter()
    for part, times in ((text, 1), (text_of_loops(text), repeats)):
        for (kind, size), count in collectives(part).items():
            exchanged[kind] += times * count * size
    return exchanged


def text_of_loops(text: str) -> str:
    """The computations of a compiled program that loops run, directly or by calls."""
    computations = dict(_COMPUTATION.findall(text))
    inside: set[str] = set()
    new = set(re.findall(r"body=%?([\w.-]+)", text))
    while new:
        inside |= new
        called = {name for one in new for name in re.findall(r"[\w.-]+", computations[one])}
        new = (called & computations.keys()) - inside
    return "".join(computations[name] for name in sorted(inside))


LENGTHS = (1024, 4096, 16384, 65536)
MEMORY_TECHNIQUES: dict[str, dict[str, Any]] = {
    "plain": {},
    "plain, by scan": {"mixer_options": {"method": "scan"}},
    "sequence parallelism, 8 devices, each": {"sequence": 8},
    "rematerialized blocks": {"remat": "block"},
    "exact, windows of 1,024": {"bptt_window": 1024, "bptt": "full"},
    "truncated, windows of 1,024": {"bptt_window": 1024},
}
"""Fields of the configuration that differ from plain training."""


def run_memory() -> Iterator[Table]:
    """MB on one device by technique and length, which do not vary."""
    curves = {
        name: on_simulated_devices(
            fields.get("sequence", 1), measure_memory, technique=name, lengths=LENGTHS
        )
        for name, fields in MEMORY_TECHNIQUES.items()
    }
    panels = {"working memory of a train step of base, MB": curves}
    yield Table(
        "memory: train step of base, B 1, float32", panels=panels, x="tokens", picture="memory"
    )


def measure_memory(technique: str, lengths: tuple[int, ...]) -> dict[str, float]:
    """MB on one device by length; for `on_simulated_devices`."""
    configs = {str(n): load_config("base", 1, n, **MEMORY_TECHNIQUES[technique]) for n in lengths}
    return {n: megabytes(compile_quickly(config)) for n, config in configs.items()}
