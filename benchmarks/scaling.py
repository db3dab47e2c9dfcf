"""The ways to scale training, A to F, each beside the same training without it.

Every training is of the same small model and as many tokens of the default corpus; the loss is that
of held-out text with the state carried. Other draws of parameters and batches say what of a
difference is chance: so short a training ends elsewhere even by another order of sums. Memory is
what a step works in on one device, by the compiler's account. Devices of a mesh are simulated ones
that share this machine's cores, so that their tokens/s say what a schedule costs, not what more
hardware gains.

- A: training by sliding windows; evaluation by overlapping ones, beside a carried state
- B: layers over stages; beside it, time over devices
- C: one token at a time without compilation, compiled, in chunks, and as one function
- D: bfloat16 for products, and for the state; what the latter loses by position
- E: truncated back-propagation, from step to step and inside of one, and its bias
- F: a prefix read once and kept
"""

import copy
import functools
import tempfile
from typing import Any

import jax

from benchmarks import scaling_memory, scaling_parts, tables
from benchmarks.interleave import Effort
from benchmarks.isolated import call_isolated
from benchmarks.jax_steps import BY_SCAN, load_config
from benchmarks.short_training import Trained, measure_short, train_short
from simplernn_jax import config as config_lib
from simplernn_jax.config import Config
from simplernn_jax.ops import gated_linear_recurrence
from simplernn_jax.ops.chunkwise import choose_chunk_size

BATCH, LENGTH, STEPS = 8, 256, 200
LONG = 4
"""Times LENGTH, of the rows that are cut into windows; with as many times fewer rows."""

ORDER = "=ABCDEF+"
"""First letters of names, as the table has them: the plain run, the list, what goes with it."""

Row = dict[str, Any]


def run(effort: Effort) -> dict[str, Any]:
    """Measures and prints everything; each training is its own repetition, `effort` is unused."""
    del effort
    with tempfile.TemporaryDirectory() as workdir:
        rows, trained = compare(small_run(), workdir)
        bias = scaling_parts.truncation_bias(long_rows(small_run()), trained)
        rows += scaling_parts.evaluations(small_run(), trained)
        rows += scaling_parts.cached_prefix(small_run(), trained, workdir)
    rows.sort(key=lambda row: ORDER.index(row["name"][0]))
    errors = scaling_parts.state_errors()
    _show(rows, STEPS * BATCH * LENGTH)
    scaling_parts.show_bias(bias)
    scaling_parts.show_errors(errors)
    memory = scaling_memory.measure()
    scaling_memory.show(memory)
    return {"rows": rows, "truncation_bias": bias, "state_errors": errors, "memory": memory}


def small_run(steps: int = STEPS) -> Config:
    """Two residual layers of width 64 on windows of the default corpus."""
    widths = {"hidden_dim": 64, "key_dim": 64, "value_dim": 64, "mlp_dim": 256}
    config = load_config("tiny", BATCH, LENGTH, **widths)
    config.model.vocab_size = 260  # even, so that a mesh can divide it
    config.train.steps = steps
    config.optimizer.learning_rate, config.optimizer.warmup_steps = 1e-2, 50
    config.train.eval_tokens = 65536
    config.mesh.data = 1
    return config


def long_rows(config: Config) -> Config:
    """As many tokens in fewer, longer rows."""
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
    """Name, what it changes, configuration and options of `train_short`, of each but the plain."""
    long = long_rows(copy.deepcopy(base))
    window = base.data.sequence_length
    by_chunks = functools.partial(gated_linear_recurrence, chunk_size=choose_chunk_size(window))
    return [
        ("= another draw", "parameters and batches", base, {"draw": 1}),
        ("= a third draw", "likewise", base, {"draw": 2}),
        (
            "A sliding windows",
            "one begins every half window",
            changed(base, stride=window // 2),
            {},
        ),
        ("C one token at a time", "a compiled loop", base, {"recurrence": BY_SCAN}),
        ("C in chunks", "matrix products in XLA", base, {"recurrence": by_chunks}),
        ("D bfloat16 products", "their operands", changed(base, precision="bfloat16"), {}),
        ("D bfloat16 state", "the recurrent state", changed(base, state_precision="bfloat16"), {}),
        ("E streams", "the state goes on between steps", changed(base, mode="stream"), {}),
        ("E long rows", f"rows of {LONG} windows, all backward", long, {}),
        (
            "E truncated in a step",
            "these rows, gradients cut",
            changed(long, backward_window=window),
            {},
        ),
        (
            "E exact in windows",
            "these rows, forward twice",
            changed(long, backward_window=window, backward="exact"),
            {},
        ),
        ("+ accumulation", "4 groups of rows", changed(base, gradient_accumulation=4), {}),
        ("+ rematerialisation", "layers computed again", changed(base, remat="block"), {}),
    ]


def compare(base: Config, workdir: str) -> tuple[list[Row], Trained]:
    """Trains by every technique; the rows of the table, and what the plain training gave."""
    plain = train_short(base, workdir)
    rows: list[Row] = [{"name": "= plain", "changes": "whole step compiled, fused recurrence"}]
    rows[0] |= plain.measured
    for name, changes, config, options in trainings(base):
        measured = train_short(config, workdir, **options).measured
        rows.append({"name": name, "changes": changes} | measured)
    rows.append(scaling_parts.eager_step(base))
    for name, changes, axis in (
        ("B layers over stages", "2 devices, a layer each", "stage"),
        ("B time over devices", "2 devices, half of each row", "sequence"),
    ):
        text = config_lib.to_json(changed(base, **{axis: 2}))
        flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
        measured = call_isolated(measure_short, flags, config=text, workdir=workdir)
        rows.append({"name": name, "changes": changes} | measured)
    for row in rows[1:]:
        if "loss" in row:
            row["loss_difference"] = row["loss"] - plain.measured["loss"]
    return rows, plain


def draw(results: dict[str, Any], folder: str) -> list[str]:
    """Writes the pictures of what `run` returned; their paths."""
    return [scaling_memory.draw(results["memory"], folder)]


def _show(rows: list[Row], tokens: int) -> None:
    lines = [
        [
            row["name"],
            row["changes"],
            tables.number(row.get("memory_mb"), 1),
            tables.number(row.get("tokens_per_s")),
            tables.number(row.get("loss"), 4),
            "-" if row.get("loss_difference") is None else f"{row['loss_difference']:+.4f}",
        ]
        for row in rows
    ]
    title = f"scaling: 2 layers of width 64, {tokens:,} tokens, {jax.devices()[0].device_kind}"
    headings = ["technique", "what it changes", "memory MB", "tokens/s", "nats/token", "difference"]
    tables.show(title, headings, lines)
