"""Loss on the default corpus, and exactness of the recurrence's implicit attention map."""

import statistics
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks.attention.report import Line, Measurement, Results
from benchmarks.attention.variants import ATTENTION, RECURRENCE, VARIANTS, config_of
from benchmarks.corpus_training import Trained, train_on_corpus
from benchmarks.train_steps import count_parameters
from simplernn_jax.analysis import decompose_layers

LENGTH, BATCH = 256, 8
LOSSES = "bits/byte by seed"


def train(
    variant: str, folder: str, steps: int, eval_tokens: int, rate: float | None, seed: int
) -> Trained:
    """Train a variant from random parameters; `rate` None is that of its configuration."""
    config = config_of(variant, LENGTH, BATCH)
    config.train.steps, config.train.eval_tokens = steps, eval_tokens
    config.optimizer.learning_rate = rate or config.optimizer.learning_rate
    trained = train_on_corpus(config, folder, seed=seed)
    print(f"  {variant}, rate {rate}, seed {seed}: {trained.measured}", flush=True)
    return trained


def measure_corpus(
    steps: int, seeds: int, rates: tuple[float, ...], eval_tokens: int
) -> dict[str, Any]:
    """Held-out bits/byte of text of the standard library.

    It is scored document after document, the state carried; attention sees the last 256 bytes, as
    in training. The learning rate is the best for the first seed, by the same text.
    """
    rows = []
    with tempfile.TemporaryDirectory() as folder:

        def loss(variant: str, rate: float, seed: int) -> float:
            return train(variant, folder, steps, eval_tokens, rate, seed).measured["bits/byte"]

        for variant in VARIANTS:
            tried = {rate: loss(variant, rate, 0) for rate in rates}
            best = min(tried, key=lambda rate: tried[rate])
            losses = [tried[best], *(loss(variant, best, seed) for seed in range(1, seeds))]
            rows.append(
                {
                    "variant": variant,
                    "parameters": count_parameters(config_of(variant, LENGTH)),
                    "bytes of training": steps * LENGTH * BATCH,
                    **{f"rate {rate:g}": loss for rate, loss in tried.items()},
                    LOSSES: losses,
                }
            )
    return {"rows": rows}


def corpus_lines(results: Results) -> Iterator[Line]:
    """Lines for mean and range of the loss; means within the larger range count as equal."""
    losses = {row["variant"]: row[LOSSES] for row in results["rows"]}
    seeds = len(losses[RECURRENCE])
    ranges = {variant: max(each) - min(each) for variant, each in losses.items()}
    yield Line(
        "scalability",
        f"held-out bits/byte after {results['rows'][0]['bytes of training']:,} bytes, "
        f"mean of {seeds} seed(s)",
        {variant: statistics.mean(each) for variant, each in losses.items()},
        as_ratio=False,
        tolerance=max(ranges.values()),
        is_decisive=seeds > 1,
    )
    if seeds > 1:
        what = "range over seeds; means that differ by less count as equal"
        yield Line("scalability", what, ranges, is_decisive=False)


def measure_interpretability(steps: int, tokens: int) -> dict[str, Any]:
    """Relative error of the recurrence's implicit attention map.

    Weights times values must equal the output of the definition, and, after norm, gate and
    projection, that of the layer. Attention's weights are those of its softmax.
    """
    with tempfile.TemporaryDirectory() as folder:
        trained = train(RECURRENCE, folder, steps, 65_536, None, 0)
        assert trained.corpus.validation is not None
        held_out = np.array(trained.corpus.validation.tokens[:tokens])
    model = trained.model()
    accounts = decompose_layers(model, held_out, model.initial_state(1))
    rows = [
        {
            "error against the definition": float(account.operator_error),
            "error after norm, gate and projection": float(account.layer_error),
        }
        for account in accounts
    ]
    return {"rows": rows}


def interpretability_lines(results: Results) -> Iterator[Line]:
    """Lines for the errors of the worst layer."""
    for what in results["rows"][0]:
        values = {RECURRENCE: max(row[what] for row in results["rows"]), ATTENTION: None}
        yield Line("interpretability", f"{what}, worst layer", values)


CORPUS = Measurement(
    measure_corpus,
    corpus_lines,
    {"steps": 150, "seeds": 1, "rates": (1.6e-2,), "eval_tokens": 65_536},
    {"steps": 1400, "seeds": 3, "rates": (4e-3, 8e-3, 1.6e-2, 3.2e-2), "eval_tokens": 0},
)
INTERPRETABILITY = Measurement(
    measure_interpretability,
    interpretability_lines,
    {"steps": 50, "tokens": 256},
    {"steps": 1400, "tokens": 1024},
)
