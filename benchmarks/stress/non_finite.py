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
from simplernn_jax.models import TokenMixer, register_mixer
from simplernn_jax.models.mixers.token_mixer import find_mixer, make_mixer
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
from .experiment import Case
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
"""Fields of the train state in which a value is put; it leaves the last one with a reset."""
PASSES = {"the loss": 1000, "the gradient": 100_000}
"""The forward and the backward pass: segment ids of a poisoned sequence are raised by this number
times that of the value, from 1."""
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
"""Fraction of the poisoned batches in which every sequence is poisoned, and so every device."""

Step = Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]


def non_finite(folder: Path, count: int, seed: int) -> Iterator[Case]:
    """A step whose loss or gradient is not finite changes only counters; too many end the run.

    Values are put into a running train step and what it carries, on one device and on meshes.
    """
    yield from on_simulated_devices(2, check_all, numbers=range(count), seed=seed)


def check_all(numbers: Sequence[int], seed: int) -> list[Case]:
    """Check the cases of these numbers; for `on_simulated_devices`."""
    cases = []
    for number in numbers:
        name = list(MODES)[number % len(MODES)]
        config, first, step = program_of(name)
        places = [*PLACES] if first.carried else [*PLACES][:-1]
        if config.mesh.sequence == 1:  # shards renumber segments, which carry the poison
            places += PASSES
        pairs = [(place, value) for value in VALUES for place in places]
        place, value = pairs[(number // len(MODES) + 2 * (number % len(MODES))) % len(pairs)]
        draw = np.random.default_rng([seed, number])
        state, _ = step(first, draw_batch(draw))
        what, problem = f"{number}, {name}, {value} in {place}", None
        try:
            if place in PASSES:
                batch = poisoned_batch(draw, place, value)
                check_passing(config, step, (state, batch), state, place, value, draw)
            else:
                bad, leaf = spoil(state, PLACES[place], value, draw)
                what += leaf
                if place == "the carried state":
                    poisoned = bad, draw_batch(draw)
                    check_passing(config, step, poisoned, state, place, value, draw)
                else:
                    check_lasting(config, step, bad, place, value, draw)
        except AssertionError as error:
            problem = str(error)
        cases.append(Case(what, problem, place))
    return cases


@jax.custom_vjp
def poison(x: jax.Array, forward: jax.Array, backward: jax.Array) -> jax.Array:
    """Add `forward` to `x`, and `backward` to its gradient."""
    return x + forward


poison.defvjp(
    lambda x, forward, backward: (x + forward, backward),
    lambda backward, d_x: (d_x + backward, jnp.zeros_like(backward), jnp.zeros_like(backward)),
)


@register_mixer("poisoned", mesh_axes=find_mixer("simple_rnn").mesh_axes)
class Poisoned(TokenMixer):
    """SimpleRNN that poisons the sequences whose segment ids are high."""

    def __init__(self, config: Any, *, rngs: Any):
        self.inner = make_mixer("simple_rnn", config, rngs=rngs)

    def initial_state(self, batch_size: int) -> Any:
        """See `TokenMixer`."""
        return self.inner.initial_state(batch_size)

    def state_axes(self) -> Any:
        """See `TokenMixer`."""
        return self.inner.state_axes()

    def reset(self, state: Any, where: Any) -> Any:
        """See `TokenMixer`."""
        return self.inner.reset(state, where)

    def mix(self, x: Any, state: Any, segment_ids: Any) -> Any:
        """Compute the layer, and add values to its output and its gradient."""
        output, state = self.inner.mix(x, state, segment_ids)
        values = jnp.asarray([0.0, *VALUES.values()], output.dtype)
        ids = segment_ids[:, :, None]
        return poison(output, *(values[ids // unit % 100] for unit in PASSES.values())), state


@functools.cache
def program_of(mode: str) -> tuple[Config, TrainState, Step]:
    """Compile the step of a mode: its configuration, its first state, and a step that keeps it."""
    sizes = {"vocab_size": VOCAB, "num_layers": 2, "num_heads": 2, "batch_size": SEQUENCES}
    widths = dict.fromkeys(("hidden_dim", "key_dim", "value_dim", "mlp_dim"), 8)
    run = {"sequence_length": LENGTH, "warmup_steps": 1, "max_skipped_updates": MAX_SKIPS}
    config = change(Config(), mixer="poisoned", **sizes, **widths, **run, **MODES[mode])
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


def poisoned_batch(draw: np.random.Generator, place: str, value: str) -> Batch:
    """Draw a batch with a value in a pass of one of its sequences, or of all of them."""
    batch = draw_batch(draw)
    sequence = slice(None) if draw.random() < ALL else draw.integers(SEQUENCES)
    batch.segment_ids[sequence] += PASSES[place] * (1 + list(VALUES).index(value))
    return batch


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


def check_passing(
    config: Config,
    step: Step,
    poisoned: tuple[TrainState, Batch],
    good: TrainState,
    place: str,
    value: str,
    draw: np.random.Generator,
) -> None:
    """Check a step with a poisoned state or batch, and the one after it, which leaves it behind."""
    bad, batch = poisoned
    after, metrics = step(bad, batch)
    is_skipped = check_step(bad, after, metrics)
    assert is_skipped or value == "overflow", "the update was not skipped"
    is_loss_finite = place != "the gradient" or np.isfinite(metrics.loss)
    assert is_loss_finite, "the loss is not finite either"
    if is_skipped:
        following = draw_batch(draw, reset=place not in PASSES)
        later, metrics = step(after, following)
        check_step(after, later, metrics)
        check_same("after the skipped step", later, step(good, following)[0])
        for number in range(1, MAX_SKIPS + 1):
            bad, metrics = step(bad, batch)
            stops = is_stopped(config, metrics, int(bad.step))
            problem = f"{number} consecutive skips of at most {MAX_SKIPS}"
            assert stops == (number == MAX_SKIPS), problem


def check_lasting(
    config: Config, step: Step, state: TrainState, place: str, value: str, draw: np.random.Generator
) -> None:
    """Check steps with a number that stays where it is; NaN must end the run."""
    for _ in range(3 * MAX_SKIPS):
        after, metrics = step(state, draw_batch(draw))
        # The optimizer's state is not checked: what it spoils is found by the next loss.
        check_step(state, after, metrics, may_spread=place != "a parameter")
        state = after
        if is_stopped(config, metrics, int(state.step)):
            return
    assert value != "NaN", "the run continues"
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.carried)), "the run continues"


def check_step(
    before: TrainState, after: TrainState, metrics: StepMetrics, *, may_spread: bool = False
) -> bool:
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
        return True
    assert bytes_of(after.params) != bytes_of(before.params), "an applied update changed nothing"
    if not may_spread:
        pairs = zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True)
        is_lost = any((np.isfinite(old) & ~np.isfinite(new)).any() for new, old in pairs)
        assert not is_lost, "an applied update made numbers that are not finite"
    return False


def check_same(when: str, found: TrainState, expected: TrainState) -> None:
    """Check all but the counters."""
    for field in ("params", "opt_state", "carried", "rng"):
        is_same = bytes_of(getattr(found, field)) == bytes_of(getattr(expected, field))
        assert is_same, f"{field} changed {when}"


def is_stopped(config: Config, metrics: StepMetrics, step: int) -> bool:
    """Return whether the loop stops, with one line that says why."""
    try:
        check_skips(step, int(metrics.consecutive_skips), config.train)
    except UserError as error:
        text = str(error)
        updated = f"last updated at step {step - MAX_SKIPS}:"
        is_right = "\n" not in text and "not finite" in text and updated in text
        assert is_right, f"the run stops with: {text}"
        return True
    return False
