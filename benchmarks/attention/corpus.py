"""Loss on the default corpus, and exactness of the recurrence's implicit attention map."""

import statistics
import tempfile
from typing import Any

import numpy as np

from simplernn_jax.analysis import decompose_layers
from simplernn_jax.errors import counted

from ..tables import Row
from ..train_steps import count_parameters, train_on_corpus
from .aspects import ATTENTION, RECURRENCE, VARIANTS, Measured, config_of, line

LENGTH, BATCH = 256, 8


def measure_corpus(quick: bool) -> Measured:
    """Held-out bits/byte of text of the standard library.

    It is scored document after document, the state carried; attention sees the last 256 bytes, as
    in training.
    """
    fields = {"steps": 150, "eval_tokens": 65_536} if quick else {"steps": 1400, "eval_tokens": 0}
    rows: list[Row] = []
    losses: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    with tempfile.TemporaryDirectory() as folder:
        for variant in VARIANTS:
            for seed in range(1 if quick else 3):
                config = config_of(variant, LENGTH, BATCH, **fields)
                measured = train_on_corpus(config, folder, seed=seed).measured
                print(f"  {variant}, seed {seed}: {measured}", flush=True)
                losses[variant].append(measured["bits/byte"])
            row = {"variant": variant, "parameters": count_parameters(config_of(variant, LENGTH))}
            rows.append(row | {"bits/byte by seed": losses[variant]})
    return Measured(loss_lines(fields["steps"] * LENGTH * BATCH, losses), rows=rows)


def loss_lines(num_bytes: int, losses: dict[str, list[float]]) -> list[Row]:
    """Lines for mean and range of the loss; means within the larger range count as equal."""
    seeds = len(losses[RECURRENCE])
    means = {variant: statistics.mean(each) for variant, each in losses.items()}
    ranges = {variant: max(each) - min(each) for variant, each in losses.items()}
    what = f"held-out bits/byte after {num_bytes:,} bytes, mean of {counted(seeds, 'seed')}"
    largest = max(ranges.values())
    mean = line("scalability", what, means, tolerance=largest, is_decisive=seeds > 1)
    what = "range over seeds; means that differ by less count as equal"
    return [mean, line("scalability", what, ranges, is_decisive=False)][:seeds]


def measure_interpretability(quick: bool) -> Measured:
    """Relative error of the recurrence's implicit attention map.

    Weights times values must equal the output of the definition, and, after norm, gate and
    projection of the layer. Attention's weights are its softmax.
    """
    steps, tokens = (50, 256) if quick else (1400, 1024)
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(RECURRENCE, LENGTH, BATCH, steps=steps, eval_tokens=65_536)
        trained = train_on_corpus(config, folder)
        held_out: Any = trained.corpus.validation
        ids = np.array(held_out.tokens[:tokens])
    model = trained.model()
    layers = decompose_layers(model, ids, model.initial_state(1))
    errors = {
        "relative error of the implicit attention map": [x.operator_error for x in layers],
        "the same after norm, gate and projection": [x.layer_error for x in layers],
    }
    lines = []
    for what, each in errors.items():
        values = {RECURRENCE: float(max(each)), ATTENTION: None}
        lines.append(line("interpretability", f"{what}, worst layer", values))
    return Measured(lines)
