"""Techniques to scale training, A to F, each beside the same training without it.

Every training is of the same small model on the same number of tokens of the default corpus; the
loss is that of held-out text with the state carried. Two other seeds show the noise: so short a
training ends elsewhere even with another order of summation. Memory is the working memory of a
step on one device, by XLA's memory analysis. Devices of a mesh are simulated and share this
machine's cores, so that their tokens/s show the cost of a schedule, not the gain from hardware.
"""

import copy
import tempfile
from collections.abc import Iterator

from benchmarks import memory, scaling_parts
from benchmarks.corpus_training import Trained, measure_on_corpus, train_on_corpus
from benchmarks.measure import Effort, on_simulated_devices
from benchmarks.tables import Row, Table
from benchmarks.train_steps import BY_SCAN, by_chunks, change, load_config
from simplernn_jax.config import Config

BATCH, LENGTH, STEPS = 8, 256, 200
LONG = 4
"""Factor between long sequences and LENGTH; the batch is smaller by it."""
LONG_SIZES: Row = {"batch_size": BATCH // LONG, "sequence_length": LONG * LENGTH}
WINDOWS = LONG_SIZES | {"backward_window": LENGTH}

ORDER = "=ABCDEF+"
"""First letters of names in the order of the table; ``=`` is the plain run, ``+`` is no technique
of the list."""

TECHNIQUES: tuple[tuple[str, str, Row], ...] = (
    ("= plain", "whole step compiled, fused recurrence", {}),
    ("= second seed", "parameters and batches", {"seed": 1}),
    ("= third seed", "parameters and batches", {"seed": 2}),
    ("A sliding windows", "stride of half a window", {"stride": LENGTH // 2}),
    ("B pipeline parallelism", "2 devices, a layer each", {"stage": 2}),
    ("B sequence parallelism", "2 devices, half of each sequence", {"sequence": 2}),
    ("C one token at a time", "a compiled loop", {"recurrence": BY_SCAN}),
    ("C in chunks", "matmuls in XLA", {"recurrence": by_chunks(LENGTH)}),
    ("D bfloat16 matmuls", "operands", {"precision": "bfloat16"}),
    ("D bfloat16 state", "recurrent state", {"state_precision": "bfloat16"}),
    ("E streams", "state carried between steps", {"mode": "stream"}),
    ("E long sequences", f"{LONG} windows long, full gradient", LONG_SIZES),
    ("E truncated in a step", "long, gradient cut between windows", WINDOWS),
    ("E exact in windows", "long, forward pass recomputed", WINDOWS | {"backward": "exact"}),
    ("+ accumulation", "4 microbatches", {"gradient_accumulation": 4}),
    ("+ rematerialization", "layers recomputed", {"remat": "block"}),
)
"""Technique, change, and fields of the configuration or options of `train_on_corpus`."""


def run(effort: Effort) -> Iterator[Table]:
    """Tables of the trainings and other parts; each training runs once, `effort` is unused."""
    with tempfile.TemporaryDirectory() as workdir:
        rows, trained = compare(small_run(), workdir)
        bias = scaling_parts.truncation_bias(change(small_run(), **LONG_SIZES), trained)
        rows.append(scaling_parts.eager_step(small_run()))
        rows += scaling_parts.evaluations(small_run(), trained)
        rows += scaling_parts.cached_prefix(trained, workdir)
    rows.sort(key=lambda row: ORDER.index(row["technique"][0]))
    yield f"scaling: 2 layers of width 64, {STEPS * BATCH * LENGTH:,} tokens", rows
    yield f"scaling, E: gradient of truncated windows of {LONG * LENGTH:,} tokens", bias
    errors = scaling_parts.state_errors()
    yield "scaling, D: RMS error of the recurrence by dtype of the state", errors
    yield from memory.run(effort)


def small_run() -> Config:
    """Two residual layers of width 64 on windows of the default corpus."""
    config = load_config("tiny", BATCH, LENGTH, steps=STEPS, eval_tokens=65536)
    config.model.vocab_size = 260  # even, so that a mesh can divide it
    change(config, hidden_dim=64, key_dim=64, value_dim=64, mlp_dim=256)
    return change(config, learning_rate=1e-2, warmup_steps=50)


def compare(base: Config, workdir: str) -> tuple[list[Row], Trained]:
    """Train with every technique; return the rows of the table, and the plain training."""
    rows: list[Row] = []
    plain: Trained | None = None
    for technique, what, given in TECHNIQUES:
        options = {name: given[name] for name in ("seed", "recurrence") if name in given}
        fields = {name: value for name, value in given.items() if name not in options}
        config = change(copy.deepcopy(base), **fields)
        if fields.keys() & {"stage", "sequence"}:
            measured = on_simulated_devices(2, measure_on_corpus, config=config, workdir=workdir)
        else:
            trained = train_on_corpus(config, workdir, **options)
            plain, measured = plain or trained, trained.measured
        rows.append({"technique": technique, "change": what} | measured)
    assert plain is not None
    for row in rows[1:]:
        row["difference"] = row["nats/token"] - rows[0]["nats/token"]
    return rows, plain
