"""Techniques to scale training, A to F, each beside the same training without it.

Every training is of the same small model on the same number of tokens of the default corpus; the
loss is that of held-out text with the state carried. Two other seeds show the noise: so short a
training ends elsewhere even with another order of summation. Memory is the working memory of a
step on one device, by XLA's memory analysis. Devices of a mesh are simulated and share this
machine's cores, so that their tokens/s show the cost of a schedule, not the gain from hardware.

- A: sliding windows in training; overlapping windows in evaluation, beside a carried state
- B: pipeline parallelism over layers; beside it, sequence parallelism
- C: one token at a time without compilation, compiled, in chunks, and as one function
- D: bfloat16 for matmuls, and for the state; the error of the latter by position
- E: truncated back-propagation, between steps and inside of one, and its bias
- F: a prefix whose state is cached
"""

import copy
import tempfile
from typing import Any

import jax

from benchmarks import memory, scaling_parts, tables
from benchmarks.corpus_training import Trained, measure_on_corpus, train_on_corpus
from benchmarks.measure import Effort, on_simulated_devices
from benchmarks.train_steps import BY_SCAN, by_chunks, load_config
from simplernn_jax import config as config_lib
from simplernn_jax.config import Config

BATCH, LENGTH, STEPS = 8, 256, 200
LONG = 4
"""Factor between long sequences and LENGTH; the batch is smaller by it."""

ORDER = "=ABCDEF+"
"""First letters of names in the order of the table; ``=`` is the plain run, ``+`` is no technique
of the list."""

Row = dict[str, Any]


def run(effort: Effort) -> dict[str, Any]:
    """Measure and print; each training runs once, `effort` is unused."""
    with tempfile.TemporaryDirectory() as workdir:
        rows, trained = compare(small_run(), workdir)
        bias = scaling_parts.truncation_bias(long_sequences(small_run()), trained)
        rows += scaling_parts.evaluations(small_run(), trained)
        rows += scaling_parts.cached_prefix(trained, workdir)
    rows.sort(key=lambda row: ORDER.index(row["technique"][0]))
    errors = scaling_parts.state_errors()
    title = f"{STEPS * BATCH * LENGTH:,} tokens, {jax.devices()[0].device_kind}"
    tables.show(f"scaling: 2 layers of width 64, {title}", rows)
    title = f"scaling, E: gradient of truncated windows of {LONG * LENGTH:,} tokens"
    tables.show(title, bias)
    title = "scaling, D: RMS error of the recurrence by dtype of the state"
    tables.show(f"{title}, half-life {scaling_parts.HALF_LIFE:,} tokens", errors)
    by_length = memory.run(effort)
    return {"rows": rows, "truncation_bias": bias, "state_errors": errors, "memory": by_length}


def small_run(steps: int = STEPS) -> Config:
    """Two residual layers of width 64 on windows of the default corpus."""
    widths = {"hidden_dim": 64, "key_dim": 64, "value_dim": 64, "mlp_dim": 256}
    config = load_config("tiny", BATCH, LENGTH, **widths)
    config.model.vocab_size = 260  # even, so that a mesh can divide it
    config.train.steps = steps
    config.optimizer.learning_rate, config.optimizer.warmup_steps = 1e-2, 50
    config.train.eval_tokens = 65536
    return config


def long_sequences(config: Config) -> Config:
    """Change `config` to the same number of tokens in fewer, longer sequences."""
    config.data.batch_size //= LONG
    config.data.sequence_length *= LONG
    return config


def changed(config: Config, **fields: Any) -> Config:
    """A copy with these fields, of any section, by name."""
    config = copy.deepcopy(config)
    for name, value in fields.items():
        section = next(part for part in vars(config).values() if hasattr(part, name))
        setattr(section, name, value)
    return config


def trainings(base: Config) -> list[tuple[str, str, Config, dict[str, Any]]]:
    """Technique, change, configuration and options of `train_on_corpus`, plain training first."""
    long = long_sequences(copy.deepcopy(base))
    window = base.data.sequence_length
    cut = changed(long, backward_window=window)
    exact = changed(cut, backward="exact")
    return [
        ("= plain", "whole step compiled, fused recurrence", base, {}),
        ("= second seed", "parameters and batches", base, {"seed": 1}),
        ("= third seed", "parameters and batches", base, {"seed": 2}),
        ("A sliding windows", "stride of half a window", changed(base, stride=window // 2), {}),
        ("C one token at a time", "a compiled loop", base, {"recurrence": BY_SCAN}),
        ("C in chunks", "matmuls in XLA", base, {"recurrence": by_chunks(window)}),
        ("D bfloat16 matmuls", "operands", changed(base, precision="bfloat16"), {}),
        ("D bfloat16 state", "recurrent state", changed(base, state_precision="bfloat16"), {}),
        ("E streams", "state carried between steps", changed(base, mode="stream"), {}),
        ("E long sequences", f"{LONG} windows long, full gradient", long, {}),
        ("E truncated in a step", "long, gradient cut between windows", cut, {}),
        ("E exact in windows", "long, forward pass recomputed", exact, {}),
        ("+ accumulation", "4 microbatches", changed(base, gradient_accumulation=4), {}),
        ("+ rematerialization", "layers recomputed", changed(base, remat="block"), {}),
    ]


def compare(base: Config, workdir: str) -> tuple[list[Row], Trained]:
    """Train with every technique; return the rows of the table, and the plain training."""
    rows: list[Row] = []
    plain: Trained | None = None
    for name, change, config, options in trainings(base):
        trained = train_on_corpus(config, workdir, **options)
        plain = plain or trained
        rows.append({"technique": name, "change": change} | trained.measured)
    rows.append(scaling_parts.eager_step(base))
    for name, change, axis in (
        ("B pipeline parallelism", "2 devices, a layer each", "stage"),
        ("B sequence parallelism", "2 devices, half of each sequence", "sequence"),
    ):
        text = config_lib.to_json(changed(base, **{axis: 2}))
        measured = on_simulated_devices(2, measure_on_corpus, config=text, workdir=workdir)
        rows.append({"technique": name, "change": change} | measured)
    for row in rows[1:]:
        if "nats/token" in row:
            row["difference"] = row["nats/token"] - rows[0]["nats/token"]
    assert plain is not None
    return rows, plain
