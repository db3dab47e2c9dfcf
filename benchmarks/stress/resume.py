"""Runs resumed at every step, in every batch mode, on every mesh and from each to another."""

import itertools
import random
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from simplernn_jax.cli.compilation_cache import use_compilation_cache
from simplernn_jax.config import Config

from ..measure import on_simulated_devices
from .experiment import Case
from .runs import difference, read_checkpoint, run_quietly, small_config

MODES = ("window", "stream", "document")
AXES = ("data", "fsdp", "tensor", "sequence", "pipeline")
MESHES = ("one device", *(f"{axis} 2" for axis in AXES))
STEPS = 60
BOUNDS = {"params": 1e-6, "carried": 1e-6, "opt_state": 1e-4}
"""Largest norm of the differences, relative to the norm of the parameters, the carried state or the
optimizer state, after the steps on another mesh, which sums in another order. Gradients amplify
that: to change each parameter by one unit in the last place, once and on the same mesh, moves the
optimizer state by up to 2.5e-5 and the parameters by 4e-7."""
_CASES_OF_A_RUN = 4
"""Cases of a run in a sample; one that is resumed at all steps has STEPS - 1."""


class _Resumption(NamedTuple):
    mode: str
    before: str
    """Mesh of the run."""
    after: str
    """Mesh on which it resumes."""
    step: int


def resume(folder: Path, count: int, seed: int) -> Iterator[Case]:
    """A run resumed at any step, in any batch mode, ends with the same bytes, on six meshes."""
    draw = random.Random(seed)
    runs = list(itertools.product(MODES, MESHES))
    draw.shuffle(runs)
    if count < len(runs) * (STEPS - 1):
        runs = runs[: -(-count // _CASES_OF_A_RUN)]
    steps = min(-(-count // len(runs)), STEPS - 1)
    chosen = [
        _Resumption(mode, mesh, mesh, step)
        for mode, mesh in runs
        for step in draw.sample(range(1, STEPS), steps)
    ]
    for mesh in MESHES:
        yield from _train_and_resume(folder, mesh, chosen, chosen, save_every=1)


def meshes(folder: Path, count: int, seed: int) -> Iterator[Case]:
    """A run that resumes on another mesh ends with the same state up to rounding.

    Runs resume at a tenth step on each other mesh.
    """
    draw = random.Random(seed)
    pairs = [(m, *pair) for m in MODES for pair in itertools.permutations(MESHES, 2)]
    draw.shuffle(pairs)
    chosen = [_Resumption(*pair, draw.randrange(10, STEPS, 10)) for pair in pairs[:count]]
    for mesh in MESHES:
        _train_and_resume(folder, mesh, chosen, [], save_every=10)
    for mesh in MESHES:
        yield from _train_and_resume(folder, mesh, [], chosen, save_every=0)


def _train_and_resume(
    folder: Path,
    mesh: str,
    trained: Sequence[_Resumption],
    resumed: Sequence[_Resumption],
    save_every: int,
) -> Sequence[Case]:
    """On a mesh, take the runs of `trained`, then resume those of `resumed`, and compare them."""
    modes = sorted({one.mode for one in trained if one.before == mesh})
    here = [one for one in resumed if one.after == mesh]
    given: dict[str, Any] = {"folder": folder, "mesh": mesh, "modes": modes, "chosen": here}
    cases: Sequence[Case] = ()
    if modes or here:
        cases = on_simulated_devices(2, _run_all, **given, save_every=save_every)
    return cases


def _distances(found: dict[str, Any], expected: dict[str, Any]) -> dict[str, float]:
    """Norms of all differences of the parameters, the optimizer state etc., relative to theirs."""
    groups: dict[str, list[str]] = {}
    for name, value in expected.items():
        if isinstance(value, tuple) and value[0].startswith("float"):
            groups.setdefault(name.split("/")[0], []).append(name)
    result = {}
    for group, names in groups.items():
        ours, theirs = (
            np.concatenate([np.frombuffer(values[n][2], values[n][0]) for n in names]).astype(float)
            for values in (found, expected)
        )
        norm = max(float(np.linalg.norm(theirs)), 1e-30)
        result[group] = float(np.linalg.norm(ours - theirs)) / norm
    return result


def _train(folder: Path, mesh: str, mode: str, save_every: int, workdir: Path) -> None:
    sizes = {"num_layers": 2, "vocab_size": 260, "steps": STEPS, "save_every": save_every}
    config: Config = small_config(folder, mode=mode, keep_last=STEPS, **sizes)
    if mesh != "one device":
        setattr(config.mesh, mesh.split(maxsplit=1)[0], 2)
    run_quietly(config, workdir)


def _run_all(
    folder: Path, mesh: str, modes: Sequence[str], chosen: Sequence[_Resumption], save_every: int
) -> list[Case]:
    """`_train_and_resume` in a process with the devices of the mesh."""
    use_compilation_cache()
    for mode in modes:
        _train(folder, mesh, mode, save_every, folder / f"{mesh} {mode}")
    cases, resumed = [], folder / "resumed"
    for mode, before, after, step in chosen:
        whole, checkpoint = folder / f"{before} {mode}", Path("checkpoints", str(step))
        shutil.copytree(whole / checkpoint, resumed / checkpoint)
        _train(folder, after, mode, 0, resumed)
        found, expected = read_checkpoint(resumed), read_checkpoint(whole)
        problem = difference(found, expected)
        if after != before:
            relative = _distances(found, expected)
            # A NaN is within no bound.
            wrong = {name: f"{x:.1e}" for name, x in relative.items() if not x <= BOUNDS[name]}
            problem = f"differs by {wrong}" if wrong else None
        cases.append(Case(f"{mode} from {before} on {after} at {step}", problem, after))
        shutil.rmtree(resumed)
    return cases
