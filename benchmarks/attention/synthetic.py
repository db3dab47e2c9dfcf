"""Long-range dependency: small models trained and tested on synthetic tasks.

Recall: the number of key-value pairs that a state of some size can hold. Distance: copying,
selective copying, and a needle at a controlled distance. Models are trained through a curriculum
of stages at one length, and tested on new sequences of that length and of up to `LONGER` times it.

An answer of a task is a target that never appears as an input: ``loss_mask`` is True exactly at
queries. Every sequence starts from a zero state.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from simplernn_jax.config import Config
from simplernn_jax.data.batches import Batch
from simplernn_jax.models.language_model import abstract_model
from simplernn_jax.training.optimizer import make_optimizer
from simplernn_jax.training.train_step import init_train_state, make_train_step

from ..tables import Curves, Row
from ..train_steps import change, count_parameters, take_steps
from .aspects import ATTENTION, RECURRENCE, Measured, line

BLANK = 0
"""Neutral token; also the target where there is no query."""


class Task(NamedTuple):
    """Sequences of one kind and length."""

    length: int
    vocab_size: int
    """Ids are in ``[0, vocab_size)``."""
    fill: Callable[[np.random.Generator, np.ndarray, np.ndarray], None]
    """Writes a sequence into tokens ``[T]``, all blank, and answers into ``[T]``, all -1."""

    def batch(self, batch_size: int, seed: int, index: int) -> Batch:
        """Draw batch `index` of the stream of `seed`."""
        key = np.random.SeedSequence(seed, spawn_key=(index,))
        random = np.random.Generator(np.random.Philox(key))
        tokens = np.full((batch_size, self.length), BLANK, np.int32)
        answers = np.full((batch_size, self.length), -1, np.int32)
        for sequence in range(batch_size):
            self.fill(random, tokens[sequence], answers[sequence])
        asked, ids = answers >= 0, np.zeros(tokens.shape, np.int32)
        targets = np.where(asked, answers, BLANK)
        return Batch(tokens, targets, asked, ids, np.ones(batch_size, bool))


def recall(pairs: tuple[int, ...], length: int, symbols: int) -> Task:
    """Multi-query associative recall, MQAR (Zoology, arXiv:2312.04927, section 3)::

        tokens   k1 v1 k2 v2 k3 v3  .  k2  .  .  .  k3 k1  .
        answers   .  .  .  .  .  .  . v2  .  .  .  v3 v1  .

    Distinct keys with distinct values, as many as one of `pairs`, then each key once more, in any
    order, among blanks. Unlike in the paper, keys are queried at uniform positions (there near the
    pairs, by a power law), and the vocabulary is smaller: the blank, keys, values.
    """

    def fill(random: np.random.Generator, tokens: np.ndarray, answers: np.ndarray) -> None:
        count = int(random.choice(pairs))
        keys, values = (1 + random.choice(symbols, count, replace=False) for _ in range(2))
        values += symbols
        tokens[0 : 2 * count : 2], tokens[1 : 2 * count : 2] = keys, values
        places = 2 * count + random.choice(length - 2 * count, count, replace=False)
        tokens[places], answers[places] = keys, values

    return Task(length, 1 + 2 * symbols, fill)


def copying(length: int, count: int, symbols: int, *, scattered: bool) -> Task:
    """Copying (arXiv:1511.06464, section 5.1) and selective copying (Mamba, arXiv:2312.00752)::

        tokens   a b c . . . . . ? ? ?        or, scattered,   . a . . b . . c ? ? ?
        answers  . . . . . . . . a b c                         . . . . . . . . a b c

    To copy, a model may count; scattered symbols it must distinguish from blanks. Each symbol has a
    query, as in the second paper. Ids: the blank, the distinct symbols, the query.
    """

    def fill(random: np.random.Generator, tokens: np.ndarray, answers: np.ndarray) -> None:
        drawn = 1 + random.integers(0, symbols, count)
        places = np.arange(count)
        if scattered:
            places = np.sort(random.choice(length - count, count, replace=False))
        tokens[places] = drawn
        tokens[-count:], answers[-count:] = 1 + symbols, drawn

    return Task(length, symbols + 2, fill)


def needle(distances: tuple[int, ...], length: int, symbols: int) -> Task:
    """One value in noise, queried at given distances; like passkey retrieval
    (Landmark attention, arXiv:2305.16300), without a language::

        tokens   n n n ! 7 n n n ? n n n n n ?      distances (4, 10)
        answers  . . . . . . . . 7 . . . . . 7

    The needle starts anywhere that leaves room for the queries. Ids: the blank (unused), noise,
    values, the mark before a value, the query.
    """

    def fill(random: np.random.Generator, tokens: np.ndarray, answers: np.ndarray) -> None:
        tokens[:] = random.integers(1, 1 + symbols, length)
        start = int(random.integers(0, length - 1 - max(distances)))
        value = 1 + symbols + random.integers(0, symbols)
        tokens[start], tokens[start + 1] = 2 * symbols + 1, value
        queries = [start + 1 + distance for distance in distances]
        tokens[queries], answers[queries] = 2 * symbols + 2, value

    return Task(length, 2 * symbols + 3, fill)


WIDTH, LAYERS, LONGER = 64, 2, 4
TRAIN_SEED, TEST_SEED = 0, 1
TEST_TOKENS = 16_384
"""Tokens of one call, so that long sequences take no more memory than short ones."""
PLAIN = "PyTorch reference (plain)"
"""The layers of the PyTorch project: no convolution, norm, residual or MLP."""
BATCH, HARD_TOKENS = 32, 3072
"""Sequences of a batch, and tokens of one of the second stage of recall."""
COPIED, DISTANCES = 64, (4, 8, 16, 32, 56)
"""Tokens of a sequence of copying, and distances of the needle, in training."""

Stage = tuple[Task, int, int]
"""Task, steps and batch size of a part of a curriculum; the next part continues from its end."""


class Trained(NamedTuple):
    """A model after its curriculum."""

    config: Config
    params: nnx.State
    loss: float
    """Nats per answer, mean over the last tenth of the steps."""


def variant(name: str, context: int) -> Config:
    """A model variant: `ATTENTION`, `PLAIN` or ``"SimpleRNN K x V"``; attention sees `context`."""
    config = change(Config(), num_layers=LAYERS, num_heads=1, mixer_options={"context": context})
    change(config, hidden_dim=WIDTH, key_dim=WIDTH, value_dim=WIDTH, mlp_dim=2 * WIDTH)
    if name == ATTENTION:  # as many parameters as the recurrence's forget gates
        return change(config, mixer="attention", mlp_dim=2 * WIDTH + 32)
    if name == PLAIN:
        return change(config, block="plain")
    key_dim, value_dim = map(int, name.removeprefix(RECURRENCE).split("x"))
    return change(config, key_dim=key_dim, value_dim=value_dim)


def train(config: Config, stages: Sequence[Stage], optimizer: str, rate: float) -> Trained:
    """Train through all stages, with one schedule of the learning rate over them."""
    plan = [(task, size) for task, steps, size in stages for _ in range(steps)]
    steps, vocab_size = len(plan), stages[0][0].vocab_size
    change(config, vocab_size=vocab_size, mode="window", steps=steps)
    change(config, name=optimizer, learning_rate=rate, warmup_steps=max(steps // 20, 1))
    transform = make_optimizer(config.optimizer, steps)
    state = jax.jit(lambda: init_train_state(config, transform))()
    batches = (task.batch(size, TRAIN_SEED, i) for i, (task, size) in enumerate(plan))
    state, metrics = take_steps(make_train_step(config, transform), state, batches)
    losses = jax.device_get([each.loss for each in metrics[-max(steps // 10, 1) :]])
    return Trained(config, state.params, float(np.mean(losses)))


def train_best(
    make_config: Callable[[], Config], stages: Sequence[Stage], rates: Iterable[tuple[str, float]]
) -> tuple[str, Trained]:
    """Train at every learning rate; return the name and result of the lowest training loss.

    `rates` are pairs of optimizer and rate.
    """
    trials = {f"{name} {rate:g}": train(make_config(), stages, name, rate) for name, rate in rates}
    best = min(trials, key=lambda trial: np.nan_to_num(trials[trial].loss, nan=np.inf))
    print(f"  {best} of {', '.join(trials)}", flush=True)
    return best, trials[best]


def accuracy(trained: Trained, task: Task, sequences: int) -> float:
    """Fraction of answers that are the likeliest token, over at least `sequences` sequences."""
    graph, _ = abstract_model(trained.config.model)

    @jax.jit
    def count(params: Any, batch: Batch) -> jax.Array:
        logits, _ = nnx.merge(graph, params)(batch.tokens)
        right = (jnp.argmax(logits, axis=-1) == batch.targets) & batch.loss_mask
        return jnp.stack([jnp.sum(right), jnp.sum(batch.loss_mask)])

    size = max(min(TEST_TOKENS // task.length, sequences), 1)
    batches = (task.batch(size, TEST_SEED, i) for i in range(-(-sequences // size)))
    right, asked = np.sum([count(trained.params, batch) for batch in batches], axis=0)
    return float(right / asked)


def evaluate(
    names: Sequence[str],
    stages: Sequence[Stage],
    tests: Mapping[str, Mapping[int, Task]],
    rates: Sequence[tuple[str, float]],
    sequences: int,
) -> tuple[list[Row], dict[str, Curves]]:
    """Train variants at every learning rate; test those with the lowest training loss.

    `rates` are pairs of optimizer and rate; adamw is for `PLAIN` alone. Returns rows of models, and
    curves of accuracy on at least `sequences` sequences, by title of `tests` and x.
    """
    context = max(task.length for by_x in tests.values() for task in by_x.values())
    rows: list[Row] = []
    curves: dict[str, dict[str, dict[str, float]]] = {title: {} for title in tests}
    for name in names:
        tried = [pair for pair in rates if pair[0] == "muon" or name == PLAIN]
        print(f"  {name}:", flush=True)
        best, trained = train_best(partial(variant, name, context), stages, tried)
        parameters = count_parameters(trained.config)
        rows.append({"model": name, "parameters": parameters, "best rate": best})
        for title, by_x in tests.items():
            scores = {str(x): accuracy(trained, task, sequences) for x, task in by_x.items()}
            curves[title][name] = scores
    return rows, {**curves}


def measure_recall(quick: bool) -> Measured:
    """Accuracy of multi-query associative recall (arXiv:2312.04927) by the number of pairs.

    Pairs of key and value, then some of the keys again, anywhere; the answer is the value of the
    key. There are 64 keys and 64 values; models have 2 layers of width 64 and one head. The first
    stage of training has sequences of 48 tokens with up to 16 pairs, the second all numbers of
    pairs.
    """
    pairs = (4, 8, 16) if quick else (4, 8, 16, 32, 64)
    states = ["64 x 64"] if quick else ["16 x 16", "32 x 32", "64 x 64", "128 x 128"]
    names = [*(f"{RECURRENCE} {state}" for state in states), ATTENTION, PLAIN]
    length, steps, sequences = (48, (400, 100), 128) if quick else (192, (1500, 1500), 256)
    more = [("muon", 1.5e-2), ("adamw", 3e-3), ("adamw", 1e-2)]
    rates = [("muon", 3e-2), *(() if quick else more)]
    easy, hard = recall((4, 8, 16), 48, 64), recall(pairs, length, 64)
    stages = [(easy, steps[0], BATCH), (hard, steps[1], HARD_TOKENS // length)]
    tests = {
        title: {count: recall((count,), factor * length, 64) for count in pairs}
        for title, factor in (("recall", 1), (f"recall, sequences {LONGER} times as long", LONGER))
    }
    rows, curves = evaluate(names, stages, tests, rates, sequences)
    lines = [matched(rows, curves, title, x, "pairs") for title in tests for x in pairs]
    return Measured(lines, curves, "pairs", rows)


def measure_distance(quick: bool) -> Measured:
    """Accuracy by length, or by the distance of a needle, up to 4 times the one in training.

    Copying (arXiv:1511.06464, section 5.1): 8 symbols, blanks, then the symbols in order. Selective
    copying (arXiv:2312.00752): the symbols are anywhere among the blanks. Needle: one value in
    noise, asked for at given distances. Trained on 64 tokens, and distances up to 56.
    """
    steps, sequences = (300, 64) if quick else (1000, 256)
    states = ["64 x 64"] if quick else ["16 x 16", "64 x 64"]
    names = [*(f"{RECURRENCE} {state}" for state in states), ATTENTION]
    rates = [("muon", 3e-2), *(() if quick else [("muon", 1e-2)])]
    lines: list[Row] = []
    curves: dict[str, Curves] = {}
    for title, (task, by_x) in distance_tasks().items():
        models, found = evaluate(names, [(task, steps, BATCH)], {title: by_x}, rates, sequences)
        curves |= found
        longest = max(by_x)
        lines += [matched(models, found, title, x, "tokens") for x in (longest // LONGER, longest)]
    return Measured(lines, curves, "tokens")


def distance_tasks() -> dict[str, tuple[Task, dict[int, Task]]]:
    """Return by title the task of training and the tests by length, or by distance."""

    def at(*distances: int) -> Task:
        return needle(distances, max(distances) + 8, 32)

    def of_lengths(scattered: bool) -> dict[int, Task]:
        lengths = (COPIED // 2, COPIED, 2 * COPIED, LONGER * COPIED)
        return {n: copying(n, 8, 14, scattered=scattered) for n in lengths}

    first, scattered = of_lengths(False), of_lengths(True)
    longer = (*DISTANCES, 2 * DISTANCES[-1], LONGER * DISTANCES[-1])
    return {
        "copying": (first[COPIED], first),
        "selective copying": (scattered[COPIED], scattered),
        "needle": (at(*DISTANCES), {n: at(n) for n in longer}),
    }


def matched(
    rows: Sequence[Row], curves: Mapping[str, Curves], title: str, x: int, unit: str
) -> Row:
    """Accuracy of attention, and of the recurrence with the same number of parameters.

    Differences up to one percentage point count as equal.
    """
    sizes = {row["model"]: row["parameters"] for row in rows}
    recurrences = (name for name in sizes if name.startswith(RECURRENCE))
    ours = min(recurrences, key=lambda name: abs(sizes[name] - sizes[ATTENTION]))
    pairs = {RECURRENCE: ours, ATTENTION: ATTENTION}
    values = {variant: 100 * curves[title][name][str(x)] for variant, name in pairs.items()}
    what = f"accuracy in %, {title}, {x} {unit}"
    return line("long-range dependency", what, values, more_is_better=True, tolerance=1.0)
