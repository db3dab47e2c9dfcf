"""Runs resumed at every step, in every batch mode, on every mesh and from each to another."""

import itertools
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

from simplernn_jax.compilation_cache import use_compilation_cache
from simplernn_jax.config import Config

from ..measure import on_simulated_devices
from .experiment import Case
from .in_process import run_quietly, small_config
from .runs import difference, distances, read_checkpoint

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
_SAVE_EVERY = 10


def same_mesh(folder: Path, count: int, seed: int) -> Iterator[Case]:
    """Resume runs at each step, on the mesh that saved it: the end has the same bytes."""
    draw = random.Random(seed)
    runs = list(itertools.product(MESHES, MODES))
    draw.shuffle(runs)
    if count < len(runs) * (STEPS - 1):
        runs = runs[: -(-count // _CASES_OF_A_RUN)]
    per_run = -(-count // len(runs))
    for mesh in dict.fromkeys(mesh for mesh, _ in runs):
        modes = [mode for other, mode in runs if other == mesh]
        steps = [draw.sample(range(1, STEPS), min(per_run, STEPS - 1)) for _ in modes]
        arguments = {"folder": folder, "mesh": mesh, "steps": dict(zip(modes, steps, strict=True))}
        yield from on_simulated_devices(2, _resume_at, **arguments)


def other_mesh(folder: Path, count: int, seed: int) -> Iterator[Case]:
    """Resume runs at a tenth step on each other mesh: the end is the same but for rounding."""
    pairs = list(itertools.product(MODES, itertools.permutations(MESHES, 2)))
    draw = random.Random(seed)
    draw.shuffle(pairs)
    pairs = pairs[:count]
    steps = [draw.randrange(_SAVE_EVERY, STEPS, _SAVE_EVERY) for _ in pairs]
    for mesh in MESHES:
        modes = sorted({mode for mode, pair in pairs if mesh in pair})
        on_simulated_devices(2, _train_all, folder=folder, mesh=mesh, modes=modes)
    for mesh in MESHES:
        chosen = [
            (mode, before, step)
            for (mode, (before, after)), step in zip(pairs, steps, strict=True)
            if after == mesh
        ]
        if chosen:
            arguments = {"folder": folder, "mesh": mesh, "chosen": chosen}
            yield from on_simulated_devices(2, _continue_on, **arguments)


def _config(folder: Path, mesh: str, mode: str, save_every: int) -> Config:
    sizes = {"num_layers": 2, "vocab_size": 260, "steps": STEPS, "save_every": save_every}
    config = small_config(folder, mode=mode, keep_last=STEPS, **sizes)
    if mesh != "one device":
        setattr(config.mesh, mesh.split(maxsplit=1)[0], 2)
    return config


def _copy_checkpoint(before: Path, step: int, after: Path) -> None:
    """Make a workdir that has one checkpoint of another."""
    shutil.copytree(before / "checkpoints" / str(step), after / "checkpoints" / str(step))


def _resume_at(folder: Path, mesh: str, steps: dict[str, list[int]]) -> list[Case]:
    use_compilation_cache()
    cases = []
    for mode, at in steps.items():
        whole, resumed = folder / f"{mesh} {mode}", folder / "resumed"
        run_quietly(_config(folder, mesh, mode, save_every=1), whole)
        expected = read_checkpoint(whole)
        for step in at:
            _copy_checkpoint(whole, step, resumed)
            run_quietly(_config(folder, mesh, mode, save_every=0), resumed)
            problem = difference(read_checkpoint(resumed), expected)
            cases.append(Case(f"{mode} at step {step} on {mesh}", problem, mesh))
            shutil.rmtree(resumed)
        shutil.rmtree(whole)
    return cases


def _train_all(folder: Path, mesh: str, modes: list[str]) -> None:
    use_compilation_cache()
    for mode in modes:
        run_quietly(_config(folder, mesh, mode, save_every=_SAVE_EVERY), folder / f"{mesh} {mode}")


def _continue_on(folder: Path, mesh: str, chosen: list[tuple[str, str, int]]) -> list[Case]:
    use_compilation_cache()
    cases = []
    for mode, before, step in chosen:
        whole, resumed = folder / f"{before} {mode}", folder / "continued"
        _copy_checkpoint(whole, step, resumed)
        run_quietly(_config(folder, mesh, mode, save_every=0), resumed)
        found = distances(read_checkpoint(resumed), read_checkpoint(whole))
        # A NaN is within no bound.
        wrong = {name: f"{x:.1e}" for name, x in found.items() if not x <= BOUNDS[name]}
        problem = f"differs by {wrong}" if wrong else None
        cases.append(Case(f"{mode} from {before} on {mesh} at {step}", problem, f"to {mesh}"))
        shutil.rmtree(resumed)
    return cases
