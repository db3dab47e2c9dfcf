"""Values that are not finite, or overflow, in a train step and what it carries."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from simplernn_jax.config import Config, MeshConfig
from simplernn_jax.data.batches import Batch
from simplernn_jax.errors import UserError
from simplernn_jax.parallel.mesh import make_mesh
from simplernn_jax.training.loop import check_skips
from simplernn_jax.training.optimizer import make_optimizer
from simplernn_jax.training.train_step import (
    StepMetrics,
    TrainState,
    init_train_state,
    make_train_step,
)

from ..measure import on_simulated_devices
from ..train_steps import change, random_documents
from . import poison
from .experiment import Case
from .poison import VALUES, spoil
from .runs import bytes_of

SEQUENCES, LENGTH, VOCAB = 4, 6, 12
MAX_SKIPS = 4
PLACES = ("a parameter", "the optimizer's state", "the carried state", "the loss", "the gradient")

MODES: dict[str, dict[str, Any]] = {
    "window": {"mode": "window", "name": "muon"},
    "data 2": {"mode": "stream"},
    "stream": {"mode": "stream"},
    "document": {"mode": "document", "bptt_window": 3},
    "bfloat16": {"mode": "stream", "precision": "bfloat16", "state_precision": "bfloat16"},
    "accumulation": {"mode": "stream", "gradient_accumulation": 2},
    "fsdp 2": {"mode": "window", "name": "muon"},
    "tensor 2": {"mode": "stream"},
    "pipeline 2": {"mode": "document"},
    "sequence 2": {"mode": "stream"},
}
"""Fields of the configuration, of any section; a number is that of devices along an axis."""
ALL = 0.3
"""Fraction of the batches in which every sequence is poisoned, and so every device."""

Step = Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]


def non_finite(folder: Path, count: int, seed: int) -> Iterator[Case]:
    """Put values into a running train step, and check what its later steps change."""
    numbers = {number: list(MODES)[number % len(MODES)] for number in range(count)}
    on_mesh = [number for number, name in numbers.items() if name[-1].isdecimal()]
    yield from check_numbers([number for number in numbers if number not in on_mesh], seed)
    if on_mesh:
        yield from on_simulated_devices(2, list_numbers, numbers=on_mesh, seed=seed)


def list_numbers(numbers: Sequence[int], seed: int) -> list[Case]:
    """`check_numbers` in a process of its own."""
    return list(check_numbers(numbers, seed))


def check_numbers(numbers: Sequence[int], seed: int) -> Iterator[Case]:
    """Check the cases of these numbers."""
    for number in numbers:
        name = list(MODES)[number % len(MODES)]
        config, first, step = program_of(name)
        pairs = [(place, value) for value in VALUES for place in PLACES]
        if not first.carried:
            pairs = [pair for pair in pairs if pair[0] != "the carried state"]
        if config.mesh.sequence > 1:  # shards renumber segments, which carry the poison
            pairs = [pair for pair in pairs if pair[0] not in ("the loss", "the gradient")]
        place, value = pairs[(number // len(MODES) + 2 * (number % len(MODES))) % len(pairs)]
        draw = np.random.default_rng([seed, number])
        state, _ = step(first, draw_batch(draw))
        where, problem = place, None
        try:
            if place in ("the loss", "the gradient"):
                check_batch(config, step, state, place, value, draw)
            elif place == "the carried state":
                where = check_carried(config, step, state, value, draw)
            else:
                where = check_lasting(config, step, state, place, value, draw)
        except BrokenPromise as error:
            problem = str(error)
        yield Case(f"{number}, {name}, {value} in {where}", problem, place)


class BrokenPromise(Exception):
    """A step has done what it must not; the message says what."""


@functools.cache
def program_of(mode: str) -> tuple[Config, TrainState, Step]:
    """Compile the step of a mode: its configuration, its first state, and a step that keeps it."""
    sizes = {"vocab_size": VOCAB, "num_layers": 2, "num_heads": 2, "batch_size": SEQUENCES}
    widths = dict.fromkeys(("hidden_dim", "key_dim", "value_dim", "mlp_dim"), 8)
    run = {"sequence_length": LENGTH, "warmup_steps": 1, "max_skipped_updates": MAX_SKIPS}
    config = change(Config(), mixer=poison.MIXER, **sizes, **widths, **run, **MODES[mode])
    axis, _, devices = mode.partition(" ")
    mesh = None
    if devices:
        config.mesh = MeshConfig(**{"data": 1, axis: int(devices)})
        mesh = make_mesh(config.mesh, jax.devices()[: int(devices)])
    optimizer = make_optimizer(config.optimizer, 100, mesh)
    donating = make_train_step(config, optimizer, mesh)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        return donating(jax.tree.map(jnp.copy, state), batch)

    return config, init_train_state(config, optimizer), step


def draw_batch(draw: np.random.Generator, *, reset: bool = False) -> Batch:
    """Draw a batch that predicts at least the first token of each sequence."""
    begins = np.append([0.0, 0.0], np.full(LENGTH - 1, 0.2))
    batch = random_documents(draw, SEQUENCES, LENGTH, VOCAB, begins)
    return batch._replace(reset=np.full(SEQUENCES, reset))


def check_batch(
    config: Config, step: Step, state: TrainState, place: str, value: str, draw: np.random.Generator
) -> None:
    """Poison the forward or the backward pass of one sequence of a batch, or of all."""
    batch = draw_batch(draw)
    sequence = slice(None) if draw.random() < ALL else draw.integers(SEQUENCES)
    batch.segment_ids[sequence] += poison.code(value, backward=place != "the loss")
    after, metrics = step(state, batch)
    is_skipped = check_step(state, after, metrics)
    if not is_skipped and value != "overflow":
        raise BrokenPromise("the update was not skipped")
    if place == "the gradient" and not np.isfinite(metrics.loss):
        raise BrokenPromise("the loss is not finite either")
    if is_skipped:
        check_goes_on("after the skipped step", step, after, state, draw_batch(draw))
        check_stops(config, step, state, batch)


def check_carried(
    config: Config, step: Step, state: TrainState, value: str, draw: np.random.Generator
) -> str:
    """Poison one number of the carried state, until a reset; name its leaf."""
    carried, name = spoil(state.carried, value, draw)
    bad = dataclasses.replace(state, carried=carried)
    batch = draw_batch(draw)
    after, metrics = step(bad, batch)
    is_skipped = check_step(bad, after, metrics)
    if not is_skipped and value != "overflow":
        raise BrokenPromise(f"the update was not skipped; {name}")
    if is_skipped:
        check_stops(config, step, bad, batch)
        check_goes_on("after the reset", step, after, state, draw_batch(draw, reset=True))
    return f"the carried state{name}"


def check_lasting(
    config: Config, step: Step, state: TrainState, place: str, value: str, draw: np.random.Generator
) -> str:
    """Poison one number that stays where it is, and name its leaf; NaN must end the run."""
    field = "params" if place == "a parameter" else "opt_state"
    spoiled, name = spoil(getattr(state, field), value, draw)
    state = dataclasses.replace(state, **{field: spoiled})
    for _ in range(3 * MAX_SKIPS):
        after, metrics = step(state, draw_batch(draw))
        # The optimizer's state is not checked: what it spoils is found by the next loss.
        check_step(state, after, metrics, may_spread=field == "opt_state")
        state = after
        if is_stopped(config, metrics, int(state.step)):
            return f"{place}{name}"
    if value == "NaN" or not all(np.isfinite(x).all() for x in jax.tree.leaves(state.carried)):
        raise BrokenPromise(f"the run continues; {name}")
    return f"{place}{name}"


def check_step(
    before: TrainState, after: TrainState, metrics: StepMetrics, *, may_spread: bool = False
) -> bool:
    """Check that a step was skipped if it was not finite, and applied if it was."""
    is_finite = bool(np.isfinite(metrics.loss) and np.isfinite(metrics.gradient_norm))
    skipped, consecutive = int(before.skipped_updates), int(before.consecutive_skips)
    expected = (skipped, 0) if is_finite else (skipped + 1, consecutive + 1)
    counters = (int(after.skipped_updates), int(after.consecutive_skips))
    reported = (int(metrics.skipped_updates), int(metrics.consecutive_skips))
    if not counters == reported == expected:
        raise BrokenPromise(f"counters {counters}, not {expected}")
    if int(after.step) != int(before.step) + 1:
        raise BrokenPromise("the step was not counted")
    if not is_finite:
        check_same("by a skipped step", after, before)
    elif bytes_of(after.params) == bytes_of(before.params):
        raise BrokenPromise("a finite update was not applied")
    elif not may_spread:
        pairs = zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True)
        if any((np.isfinite(old) & ~np.isfinite(new)).any() for new, old in pairs):
            raise BrokenPromise("an applied update made numbers that are not finite")
    return not is_finite


def check_goes_on(
    when: str, step: Step, skipped: TrainState, state: TrainState, batch: Batch
) -> None:
    """Check that a skipped step changes nothing of the next one."""
    after, metrics = step(skipped, batch)
    check_step(skipped, after, metrics)
    check_same(when, after, step(state, batch)[0])


def check_same(when: str, found: TrainState, expected: TrainState) -> None:
    """Check all but the counters."""
    for field in ("params", "opt_state", "carried", "rng"):
        if bytes_of(getattr(found, field)) != bytes_of(getattr(expected, field)):
            raise BrokenPromise(f"{field} changed {when}")


def check_stops(config: Config, step: Step, state: TrainState, batch: Batch) -> None:
    """Check that the limit of consecutive skips ends the run, and nothing before it."""
    for number in range(1, MAX_SKIPS + 1):
        state, metrics = step(state, batch)
        if is_stopped(config, metrics, int(state.step)) != (number == MAX_SKIPS):
            raise BrokenPromise(f"{number} consecutive skips of at most {MAX_SKIPS}")


def is_stopped(config: Config, metrics: StepMetrics, step: int) -> bool:
    """Return whether the loop stops, with one line that says why."""
    try:
        check_skips(step, int(metrics.consecutive_skips), config.train)
    except UserError as error:
        updated = f"last updated at step {step - MAX_SKIPS}:"
        if "\n" in str(error) or "not finite" not in str(error) or updated not in str(error):
            raise BrokenPromise(f"the run stops with: {error}") from error
        return True
    return False
