"""Long-range dependency: small models trained and tested on synthetic tasks.

Recall: the number of key-value pairs that a state of some size can hold. Distance: copying,
selective copying, and a needle at a controlled distance. Models are trained through a curriculum
of stages at one length, and tested on new sequences of that length and of up to `LONGER` times it.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.attention.report import Line, Measurement, Results
from benchmarks.attention.variants import ATTENTION, RECURRENCE
from benchmarks.train_steps import count_parameters, state_bytes
from simplernn_jax.config import Config, ModelConfig
from simplernn_jax.data.batches import Batch
from simplernn_jax.data.tasks import AssociativeRecall, Copying, Needle, Task
from simplernn_jax.training.gradient import abstract_model
from simplernn_jax.training.optimizer import make_optimizer
from simplernn_jax.training.train_step import init_train_state, make_train_step, take_steps

WIDTH, LAYERS = 64, 2
LONGER = 4
TRAIN_SEED, TEST_SEED = 0, 1
TEST_TOKENS = 16_384
"""Of one call, so that long sequences take no more memory than short ones."""

PLAIN = "seed stack (plain)"
"""The layers of the PyTorch project: no convolution, norm, residual or MLP."""

SYMBOLS = 64
"""Number of keys, and of values, of recall."""
EASY = AssociativeRecall(pairs=(4, 8, 16), sequence_length=48, symbols=SYMBOLS)
EASY_BATCH, HARD_TOKENS = 32, 3072

COPIED = 8
"""Symbols to copy."""
COPY_LENGTH, COPY_LENGTHS = 64, (32, 64, 128, 256)
"""Tokens of a sequence in training, and in tests."""
DISTANCES, TEST_DISTANCES = (4, 8, 16, 32, 56), (4, 8, 16, 32, 56, 112, 224)
DISTANCE_BATCH = 32

Rates = Mapping[str, tuple[float, ...]]
"""Learning rates to try, by optimizer."""


class Stage(NamedTuple):
    """A stage of a curriculum; the next one continues from its end."""

    task: Task
    steps: int
    batch_size: int


class Trained(NamedTuple):
    """A model after its curriculum."""

    config: Config
    params: nnx.State
    loss: float
    """Nats per answer, mean over the last tenth of the steps."""


def variant(name: str, context: int) -> ModelConfig:
    """A model variant: `ATTENTION`, `PLAIN` or ``"SimpleRNN K x V"``; attention sees `context`."""
    config = ModelConfig(
        num_layers=LAYERS,
        num_heads=1,
        mlp_dim=2 * WIDTH,
        attention_context=context,
        hidden_dim=WIDTH,
        key_dim=WIDTH,
        value_dim=WIDTH,
    )
    if name == ATTENTION:
        config.mixer = "attention"
        config.mlp_dim += 32  # as many parameters as the recurrence's forget gates
    elif name == PLAIN:
        config.block = "plain"
    else:
        config.key_dim, config.value_dim = map(int, name.removeprefix(RECURRENCE).split("x"))
    return config


def train(model: ModelConfig, stages: Sequence[Stage], optimizer: str, rate: float) -> Trained:
    """Train through all stages, with one schedule of the learning rate over them."""
    config = Config(model=model)
    config.model.vocab_size = stages[0].task.vocab_size
    config.data.mode = "window"
    config.train.steps = sum(stage.steps for stage in stages)
    config.optimizer.name, config.optimizer.learning_rate = optimizer, rate
    config.optimizer.warmup_steps = max(config.train.steps // 20, 1)
    transform = make_optimizer(config.optimizer, config.train.steps)
    state = jax.jit(lambda: init_train_state(config, transform))()
    plan = (stage for stage in stages for _ in range(stage.steps))
    batches = (
        stage.task.batch(stage.batch_size, TRAIN_SEED, index) for index, stage in enumerate(plan)
    )
    state, metrics = take_steps(make_train_step(config, transform), state, batches)
    last = metrics[-max(len(metrics) // 10, 1) :]
    losses = jax.device_get([each.loss for each in last])
    return Trained(config, state.params, float(np.mean(losses)))


def accuracy(trained: Trained, task: Task, sequences: int) -> float:
    """Fraction of answers that are the likeliest token, over at least `sequences` sequences."""
    graph, _ = abstract_model(trained.config)

    @jax.jit
    def count(params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        logits, _ = nnx.merge(graph, params)(batch.tokens)
        right = (jnp.argmax(logits, axis=-1) == batch.targets) & batch.loss_mask
        return jnp.sum(right), jnp.sum(batch.loss_mask)

    batch_size = max(min(TEST_TOKENS // task.length, sequences), 1)
    counts = [
        jax.device_get(count(trained.params, task.batch(batch_size, TEST_SEED, index)))
        for index in range(-(-sequences // batch_size))
    ]
    right, asked = np.sum(counts, axis=0)
    return float(right / asked)


def evaluate(
    names: Sequence[str],
    stages: Sequence[Stage],
    rates: Rates,
    tests: Mapping[str, Mapping[int, Task]],
    sequences: int,
) -> dict[str, Any]:
    """Train variants at every learning rate; test those with the lowest training loss.

    Args:
      names: of the variants.
      stages: of the curriculum.
      rates: learning rates by optimizer; adamw is for `PLAIN` alone.
      tests: by curve, tasks by x.
      sequences: of each test.

    Returns:
      ``rows``, a table of models, and ``curves`` of accuracy.
    """
    context = max(task.length for tasks in tests.values() for task in tasks.values())
    rows = []
    curves: dict[str, dict[str, Any]] = {curve: {} for curve in tests}
    for name in names:
        trials = {
            f"{optimizer} {rate:g}": train(variant(name, context), stages, optimizer, rate)
            for optimizer in (("muon", "adamw") if name == PLAIN else ("muon",))
            for rate in rates[optimizer]
        }
        losses = {trial: trained.loss for trial, trained in trials.items()}
        finite = {trial: loss for trial, loss in losses.items() if np.isfinite(loss)} or losses
        best = min(finite, key=finite.__getitem__)
        print(f"  {name}: {best} of {', '.join(trials)}", flush=True)
        row = {
            "model": name,
            "parameters": count_parameters(trials[best].config),
            "state bytes": state_bytes(variant(name, stages[-1].task.length)),
            "best rate": best,
            "training loss by rate": [round(loss, 3) for loss in losses.values()],
        }
        rows.append(row)
        for curve, tasks in tests.items():
            curves[curve][name] = {
                str(x): accuracy(trials[best], task, sequences) for x, task in tasks.items()
            }
    return {"rows": rows, "curves": curves}


def variants(states: Sequence[int]) -> list[str]:
    """Names of recurrences with these states, and attention."""
    return [*(f"{RECURRENCE} {size} x {size}" for size in states), ATTENTION]


def measure_recall(
    pairs: tuple[int, ...],
    length: int,
    states: tuple[int, ...],
    steps: tuple[int, int],
    rates: Rates,
    sequences: int,
) -> dict[str, Any]:
    """Accuracy of multi-query associative recall (arXiv:2312.04927) by the number of pairs.

    Pairs of key and value, then some of the keys again, anywhere; the answer is the value of the
    key. There are 64 keys and 64 values; models have 2 layers of width 64 and one head. The first
    stage of training has sequences of 48 tokens with up to 16 pairs, the second all numbers of
    pairs.
    """

    def task(length: int, *pairs: int) -> AssociativeRecall:
        return AssociativeRecall(pairs=pairs, sequence_length=length, symbols=SYMBOLS)

    stages = [
        Stage(EASY, steps[0], EASY_BATCH),
        Stage(task(length, *pairs), steps[1], HARD_TOKENS // length),
    ]
    tests = {
        title: {count: task(factor * length, count) for count in pairs}
        for title, factor in (("recall", 1), (f"recall, sequences {LONGER} times as long", LONGER))
    }
    return evaluate([*variants(states), PLAIN], stages, rates, tests, sequences)


def measure_distance(
    states: tuple[int, ...], steps: int, rates: Rates, sequences: int
) -> dict[str, Any]:
    """Accuracy by length, or by the distance of a needle, up to 4 times that of training.

    Copying (arXiv:1511.06464, section 5.1): 8 symbols, blanks, then the symbols in order. Selective
    copying (arXiv:2312.00752): the symbols are anywhere among the blanks. Needle: one value in
    noise, asked for at given distances. Trained on 64 tokens, and distances up to 56.
    """
    rows: list[dict[str, Any]] = []
    curves: dict[str, Any] = {}
    for name, (task, tests) in distance_tasks().items():
        stages = [Stage(task, steps, DISTANCE_BATCH)]
        found = evaluate(variants(states), stages, rates, {name: tests}, sequences)
        rows += [{"task": name} | row for row in found["rows"]]
        curves |= found["curves"]
    return {"rows": rows, "curves": curves}


def distance_tasks() -> dict[str, tuple[Task, dict[int, Task]]]:
    """The training task, and test tasks by length or distance, by name."""

    def copying(length: int, scattered: bool) -> Task:
        return Copying(count=COPIED, blanks=length - 2 * COPIED, scattered=scattered)

    def needle(*distances: int) -> Task:
        return Needle(distances=distances, sequence_length=max(distances) + 8)

    return {
        "copying": (copying(COPY_LENGTH, False), {n: copying(n, False) for n in COPY_LENGTHS}),
        "selective copying": (
            copying(COPY_LENGTH, True),
            {n: copying(n, True) for n in COPY_LENGTHS},
        ),
        "needle": (needle(*DISTANCES), {n: needle(n) for n in TEST_DISTANCES}),
    }


def recall_lines(results: Results) -> Iterator[Line]:
    """Lines for every number of pairs."""
    for title, curves in results["curves"].items():
        for pairs in curves[ATTENTION]:
            yield matched(results, title, pairs, "pairs")


def distance_lines(results: Results) -> Iterator[Line]:
    """Lines for the greatest length or distance of training, and of the tests."""
    for title, curves in results["curves"].items():
        longest = max(map(int, curves[ATTENTION]))
        for x in (longest // LONGER, longest):
            yield matched(results, title, str(x), "tokens")


def matched(results: Results, title: str, x: str, unit: str) -> Line:
    """Accuracy of attention, and of the recurrence with the same number of parameters.

    Differences up to one percentage point count as equal.
    """
    parameters = {row["model"]: row["parameters"] for row in results["rows"]}
    ours = min(
        (name for name in parameters if name.startswith(RECURRENCE)),
        key=lambda name: abs(parameters[name] - parameters[ATTENTION]),
    )
    curves = results["curves"][title]
    values = {RECURRENCE: 100 * curves[ours][x], ATTENTION: 100 * curves[ATTENTION][x]}
    what = f"% right, {title}, {x} {unit}"
    options: dict[str, Any] = {"more_is_better": True, "as_ratio": False, "tolerance": 1.0}
    return Line("long-range dependency", what, values, **options)


RECALL = Measurement(
    measure_recall,
    recall_lines,
    {
        "pairs": (4, 8, 16),
        "length": 48,
        "states": (64,),
        "steps": (400, 100),
        "rates": {"muon": (3e-2,), "adamw": ()},
        "sequences": 128,
    },
    {
        "pairs": (4, 8, 16, 32, 64),
        "length": 192,
        "states": (16, 32, 64, 128),
        "steps": (1500, 1500),
        "rates": {"muon": (1.5e-2, 3e-2), "adamw": (3e-3, 1e-2)},
        "sequences": 256,
    },
    x="pairs",
)
DISTANCE = Measurement(
    measure_distance,
    distance_lines,
    {"states": (64,), "steps": 300, "rates": {"muon": (3e-2,)}, "sequences": 64},
    {"states": (16, 64), "steps": 1000, "rates": {"muon": (1e-2, 3e-2)}, "sequences": 256},
    x="tokens",
)
