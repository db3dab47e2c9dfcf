"""Mixers in the same block, of the same sizes and training: loss on text, memory, and speed.

Text: `configs/base.py` with each mixer, after the steps that SimpleRNN takes in some seconds, and
after the same seconds. Recall of key-value pairs by a state of one size (`attention.synthetic`).
State tracking: the product of all elements of a group so far, asked for at every position; parity
and permutations of three and five (arXiv:2404.08819). The residual block has a short convolution,
so that the mixers have none.
"""

import itertools
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from flax import nnx

from simplernn_jax.config import Config
from simplernn_jax.models import LanguageModel

from .attention import synthetic
from .attention.synthetic import Task
from .decoding import decode_call
from .measure import Effort, alternate, block_ratio, median
from .tables import Row, Table
from .train_steps import change, count_parameters, load_config, our_step, train_on_corpus

MIXERS: dict[str, dict[str, Any]] = {
    "simple_rnn": {},
    "gla": {},
    "retnet": {},
    "hgrn2": {},
    "mamba2": {"short_convolution": 0},
    "gated_delta_net": {"short_convolution": 0},
    "gated_delta_net, negative": {"short_convolution": 0, "negative_eigenvalues": True},
    "attention": {"context": 512},
}
"""Options by name, which begins with the mixer's."""
SECONDS = 60.0
RATES = (("muon", 3e-2), ("muon", 1e-2))
"""For synthetic tasks."""
STATE = "SimpleRNN 32 x 32"
PAIRS = (8, 16, 32, 64)
TRACKED, LONGER = 32, 4
"""Elements of a sequence in training, and times as many in the last test."""
NEW_TOKENS = 256


def run(effort: Effort, source: str | None, seconds: Sequence[float]) -> Iterator[Table]:
    """Tables of text, for `source` too if given, of synthetic tasks, and of speed."""
    limit = SECONDS if [*seconds] == [0] else seconds[0]
    for text in ("stdlib", *filter(None, [source])):
        yield Table(f"mixers: bits/byte of {text}, {limit:g} s", [*text_rows(text, limit)])
    yield Table("mixers: accuracy in %", [*task_rows()])
    yield Table("mixers: speed", speed_rows(effort))


def with_mixer(config: Config, name: str) -> Config:
    """Set the mixer and its options."""
    return change(config, mixer=name.partition(",")[0], mixer_options=dict(MIXERS[name]))


def text_rows(source: str, seconds: float, names: Sequence[str] = tuple(MIXERS)) -> Iterator[Row]:
    """Held-out loss of each mixer on `source`."""
    reference = 0
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            config = with_mixer(load_config("base", 8, 256, source=source), name)
            if source != "stdlib":
                change(config, split="position")
            step = median(alternate({name: our_step(config)}, Effort(1, 20))[name])
            steps = max(1, round(seconds / step))
            reference = reference or steps
            row: Row = {"mixer": name, "parameters": count_parameters(config)}
            for title, count in (("same steps", reference), ("same time", steps)):
                if title == "same steps" or count != reference:
                    change(config, steps=count, warmup_steps=min(100, max(1, count // 10)))
                    trained = train_on_corpus(config, folder)
                row |= {title: trained.measured["bits/byte"], f"steps, {title}": count}
            print(f"  {row}", flush=True)
            yield row


def tracking(group: np.ndarray, length: int) -> Task:
    """Elements of a group, whose answers are their products so far.

    `group` is the multiplication table ``[N, N]``; element 0 is the identity.
    """

    def fill(random: np.random.Generator, tokens: np.ndarray, answers: np.ndarray) -> None:
        elements = random.integers(0, len(group), length)
        product = 0
        for place, element in enumerate(elements):
            product = group[product, element]
            answers[place] = 1 + product
        tokens[:] = 1 + elements

    return Task(length, 1 + len(group), fill)


def permutations(count: int) -> np.ndarray:
    """Multiplication table of all permutations of `count` things."""
    elements = [*itertools.permutations(range(count))]
    index = {element: place for place, element in enumerate(elements)}
    return np.array([[index[tuple(b[i] for i in a)] for b in elements] for a in elements])


def small_config(name: str) -> Config:
    """A small model for synthetic tasks."""
    return with_mixer(synthetic.variant(STATE, 512), name)


def task_rows(names: Sequence[str] = tuple(MIXERS)) -> Iterator[Row]:
    """Accuracy of each mixer on synthetic tasks, in percent; the best rate by training loss."""
    stages = [
        (synthetic.recall((4, 8, 16), 48, 64), 1500, synthetic.BATCH),
        (synthetic.recall(PAIRS, 192, 64), 1500, synthetic.HARD_TOKENS // 192),
    ]
    tests = {f"recall, {n} pairs": synthetic.recall((n,), 192, 64) for n in PAIRS}
    tasks: list[tuple[list[synthetic.Stage], dict[str, Task]]] = [(stages, tests)]
    for title, group in (
        ("parity", permutations(2)),
        ("permutations of 3", permutations(3)),
        ("permutations of 5", permutations(5)),
    ):
        lengths = (TRACKED, LONGER * TRACKED)
        parts = [(8, 1000), (TRACKED, 2000)]
        stages = [(tracking(group, n), steps, synthetic.BATCH) for n, steps in parts]
        tasks.append((stages, {f"{title}, {n} tokens": tracking(group, n) for n in lengths}))
    for name in names:
        row: Row = {"mixer": name}
        for stages, tests in tasks:
            _, best = synthetic.train_best(partial(small_config, name), stages, RATES)
            row |= {test: 100 * synthetic.accuracy(best, each, 256) for test, each in tests.items()}
        print(f"  {row}", flush=True)
        yield row


def speed_rows(effort: Effort) -> list[Row]:
    """Time of a train step of 16 x 256 tokens, and of a generated token of one stream."""
    configs = {name: with_mixer(load_config("base", 16, 256), name) for name in MIXERS}
    steps = alternate({name: our_step(config) for name, config in configs.items()}, effort)
    models = {n: LanguageModel(c.model, rngs=nnx.Rngs(0)) for n, c in configs.items()}
    calls = {name: decode_call(model, 100, NEW_TOKENS) for name, model in models.items()}
    decoding = alternate(calls, effort)
    first = next(iter(MIXERS))
    return [
        {
            "mixer": name,
            "train step, ms": 1e3 * median(steps[name]),
            f"step / {first}": block_ratio(steps[name], steps[first]),
            "token, us": 1e6 * median(decoding[name]) / NEW_TOKENS,
            f"token / {first}": block_ratio(decoding[name], decoding[first]),
        }
        for name in MIXERS
    ]
