"""Runs resumed at every step, in every batch mode, on every mesh."""

import itertools
import random
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from simplernn_jax.cli.compilation_cache import use_compilation_cache

from ..measure import on_simulated_devices
from .experiment import Case
from .runs import difference, read_checkpoint, run_quietly, small_config

MODES = ("window", "stream", "document")
ONE_DEVICE = "one device"
MESHES = (ONE_DEVICE, "data 2", "fsdp 2", "tensor 2", "sequence 2", "pipeline 2")
STEPS = 60
_CASES_OF_A_RUN = 4
"""Cases of a run in a sample; one that is resumed at all steps has STEPS - 1."""


def resume(folder: Path, count: int, seed: int) -> Iterator[Case]:
    """A run resumed at any step, in any batch mode, ends with the same bytes, on six meshes."""
    draw = random.Random(seed)
    runs = list(itertools.product(MODES, MESHES))
    draw.shuffle(runs)
    if count < len(runs) * (STEPS - 1):
        runs = runs[: -(-count // _CASES_OF_A_RUN)]
    num_steps = min(-(-count // len(runs)), STEPS - 1)
    for mode, mesh in runs:
        steps = draw.sample(range(1, STEPS), num_steps)
        given = {"folder": folder, "mode": mode, "mesh": mesh, "steps": steps}
        yield from on_simulated_devices(2, train_and_resume, **given)


def train_and_resume(folder: Path, mode: str, mesh: str, steps: Sequence[int]) -> list[Case]:
    """Run to the end, then once more from each of `steps`; for `on_simulated_devices`."""
    use_compilation_cache()
    whole, resumed = folder / f"{mesh} {mode}", folder / "resumed"
    _train(folder, mode, mesh, 1, whole)
    expected, cases = read_checkpoint(whole), []
    for step in steps:
        checkpoint = Path("checkpoints", str(step))
        shutil.copytree(whole / checkpoint, resumed / checkpoint)
        _train(folder, mode, mesh, 0, resumed)
        problem = difference(read_checkpoint(resumed), expected)
        cases.append(Case(f"{mode} on {mesh} at {step}", problem, mesh))
        shutil.rmtree(resumed)
    return cases


def _train(folder: Path, mode: str, mesh: str, save_every: int, workdir: Path) -> None:
    sizes = {"num_layers": 2, "vocab_size": 260, "steps": STEPS, "save_every": save_every}
    config = small_config(folder, mode=mode, keep_last=STEPS, **sizes)
    if mesh != ONE_DEVICE:
        setattr(config.mesh, mesh.split(maxsplit=1)[0], 2)
    run_quietly(config, workdir)
