"""Techniques to scale training, A to F, each compared with the same training without it.

Every training is of the same small model on the same number of tokens; the loss is measured on
held-out text. A second seed shows the noise. Devices of a mesh are simulated and share the cores,
so that their tokens/s show the cost of a schedule, not the gain from hardware.
"""

import copy
import os
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np

from simplernn_jax.config import Config
from simplernn_jax.inference import generate, load_state, save_state

from . import train_steps
from .measure import Effort, alternate, median, on_simulated_devices
from .tables import Row, Table
from .train_steps import Trained, change, measure_on_corpus

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
    config = train_steps.load_config("tiny", BATCH, LENGTH, steps=STEPS, eval_tokens=65536)
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
            runs.append(train_steps.train_on_corpus(config, workdir, seed=given.get("seed", 0)))
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
