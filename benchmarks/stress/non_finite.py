"""Values that are not finite, or overflow, in the state of a training."""

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
from . import Case
from .runs import bytes_of

VALUES = {"NaN": np.nan, "+inf": np.inf, "-inf": -np.inf, "overflow": 3e38}
"""Each in float32; the last is finite, and its square is not."""
SEQUENCES, LENGTH, VOCAB = 4, 6, 12
MAX_SKIPS = 4
PLACES = {
    "a parameter": "params",
    "the optimizer's state": "opt_state",
    "the carried state": "carried",
}
"""Fields of the train state in which a value is put."""
MODES: dict[str, dict[str, Any]] = {
    "window": {"mode": "window", "name": "muon"},
    "data 2": {"mode": "stream"},
    "stream": {"mode": "stream"},
    "document": {"mode": "document", "bptt_window": 3},
    "bfloat16": {"mode": "stream", "precision": "bfloat16"},
    "accumulation": {"mode": "stream", "gradient_accumulation": 2},
    "fsdp 2": {"mode": "window", "name": "muon"},
    "tensor 2": {"mode": "stream"},
    "pipeline 2": {"mode": "document"},
    "sequence 2": {"mode": "stream"},
}
"""Fields of the configuration, of any section; a number counts devices along an axis."""

Step = Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]


def non_finite(folder: Path, count: int, seed: int) -> Iterator[Case]:
    """A step whose loss or gradient is not finite changes only counters; too many end the run.

    Values are put into the state of a running training, on one device and on meshes.
    """
    yield from on_simulated_devices(2, check_all, numbers=range(count), seed=seed)


def check_all(numbers: Sequence[int], seed: int) -> list[Case]:
    """Check the cases of these numbers; for `on_simulated_devices`."""
    cases = []
    for number in numbers:
        name = list(MODES)[number % len(MODES)]
        config, first, step = program_of(name)
        draw = np.random.default_rng([seed, number])
        places = [*PLACES] if first.carried else [*PLACES][:-1]
        place, value = str(draw.choice(places)), str(draw.choice([*VALUES]))
        good, _ = step(first, draw_batch(draw))
        bad, leaf = spoil(good, PLACES[place], value, draw)
        problem = None
        try:
            check_run(config, step, bad, place, value, draw)
            if place == "the carried state":
                check_reset(step, bad, good, draw)
        except AssertionError as error:
            problem = str(error)
        cases.append(Case(f"{number}, {name}, {value} in {place}{leaf}", problem, place))
    return cases


@functools.cache
def program_of(mode: str) -> tuple[Config, TrainState, Step]:
    """Compile the step of a mode: its configuration, its first state, and a step that keeps it."""
    sizes = {"vocab_size": VOCAB, "num_layers": 2, "num_heads": 2, "batch_size": SEQUENCES}
    widths = dict.fromkeys(("hidden_dim", "key_dim", "value_dim", "mlp_dim"), 8)
    run = {"sequence_length": LENGTH, "warmup_steps": 1, "max_skipped_updates": MAX_SKIPS}
    config = change(Config(), **sizes, **widths, **run, **MODES[mode])
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


def spoil(
    state: TrainState, field: str, value: str, draw: np.random.Generator
) -> tuple[TrainState, str]:
    """Replace one number in a field of the state, and name its leaf."""
    paths, structure = jax.tree_util.tree_flatten_with_path(getattr(state, field))
    leaves = [np.array(leaf) for _, leaf in paths]
    floating = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    index = draw.choice(floating)
    leaves[index].flat[draw.integers(leaves[index].size)] = VALUES[value]
    spoiled = jax.tree.unflatten(structure, [jnp.asarray(leaf) for leaf in leaves])
    return dataclasses.replace(state, **{field: spoiled}), jax.tree_util.keystr(paths[index][0])


def check_run(
    config: Config, step: Step, state: TrainState, place: str, value: str, draw: np.random.Generator
) -> None:
    """Check steps from a state with a number that stays where it is; NaN must end the run."""
    for _ in range(3 * MAX_SKIPS):
        after, metrics = step(state, draw_batch(draw))
        # What the optimizer's state spoils is found by the next loss.
        check_step(state, after, metrics, may_spread=place == "the optimizer's state")
        state = after
        try:
            check_skips(int(state.step), int(metrics.consecutive_skips), config.train)
        except UserError:
            return
    assert value != "NaN", "the run continues"
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.carried)), "the run continues"


def check_reset(step: Step, bad: TrainState, good: TrainState, draw: np.random.Generator) -> None:
    """Check that a skipped step and a reset of all sequences leave a bad carried state behind."""
    after, metrics = step(bad, draw_batch(draw))
    if int(metrics.skipped_updates):
        batch = draw_batch(draw, reset=True)
        check_same("after the skipped step", step(after, batch)[0], step(good, batch)[0])


def check_step(
    before: TrainState, after: TrainState, metrics: StepMetrics, *, may_spread: bool
) -> None:
    """Check that a step was skipped if it was not finite, and applied if it was."""
    is_finite = bool(np.isfinite(metrics.loss) and np.isfinite(metrics.gradient_norm))
    skipped, consecutive = int(before.skipped_updates), int(before.consecutive_skips)
    expected = (skipped, 0) if is_finite else (skipped + 1, consecutive + 1)
    counters = (int(after.skipped_updates), int(after.consecutive_skips))
    reported = (int(metrics.skipped_updates), int(metrics.consecutive_skips))
    assert counters == reported == expected, f"counters {counters}, not {expected}"
    assert int(after.step) == int(before.step) + 1, "the step was not counted"
    if not is_finite:
        check_same("by a skipped step", after, before)
        return
    assert bytes_of(after.params) != bytes_of(before.params), "an applied update changed nothing"
    if not may_spread:
        pairs = zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True)
        is_lost = any((np.isfinite(old) & ~np.isfinite(new)).any() for new, old in pairs)
        assert not is_lost, "an applied update made numbers that are not finite"


def check_same(when: str, found: TrainState, expected: TrainState) -> None:
    """Check all but the counters."""
    for field in ("params", "opt_state", "carried", "rng"):
        is_same = bytes_of(getattr(found, field)) == bytes_of(getattr(expected, field))
        assert is_same, f"{field} changed {when}"
