"""Tries to break the checkpoints of a training run, and says whether anything was lost.

    python scripts/stress.py kill -n 20
    python scripts/stress.py damage -n 100
    python scripts/stress.py hosts -n 10

``kill`` trains with SIGKILL at a random moment, at least every second time inside a save, runs
the same command again to the end, and compares the last checkpoint byte for byte with that of a
run that was left alone. ``damage`` flips a bit, truncates or deletes a file of the newest
checkpoint, and expects that to be noticed and the checkpoint before it to be used. ``hosts`` kills
a random one of two processes that train together at a random moment, expects the other to end soon
and to name it, and goes on as ``kill`` does.

Exits with code 1 if anything was lost.
"""

import bootstrap

if __name__ == "__main__":
    bootstrap.start()

import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

import concurrent.futures
import contextlib
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
from absl import flags

from benchmarks import stress_hosts
from benchmarks.stress_runs import (
    SAVE_EVERY,
    STEPS,
    comparable,
    compare,
    contents,
    final_checkpoint,
    start,
    train,
)
from simplernn_jax import command_line, early_signals
from simplernn_jax.checkpoint import manifest
from simplernn_jax.checkpoint.checkpointer import Checkpointer, read_config
from simplernn_jax.checkpoint.contents import saved_leaves
from simplernn_jax.checkpoint.folder import UNFINISHED_MARK, CheckpointFolder
from simplernn_jax.errors import UserError

_ARGUMENTS = command_line.define_arguments("kill|damage|hosts")
_COUNT = flags.DEFINE_integer("n", 20, "Number of runs to kill, or of damages.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Moments and places follow from it.")

_PARALLEL = 2
"""Runs at a time: most of a short run is start-up, which keeps one core busy."""


def main() -> int:
    """Runs what the argument names; 1 if anything was lost."""
    early_signals.raise_from_now()  # there are temporary folders and children
    experiments = {
        "kill": kill_runs,
        "damage": damage_checkpoints,
        "hosts": stress_hosts.kill_processes,
    }
    if len(_ARGUMENTS.value) != 1 or _ARGUMENTS.value[0] not in experiments:
        raise UserError("say what to do: python scripts/stress.py kill, ... damage or ... hosts")
    with tempfile.TemporaryDirectory(prefix="stress-") as folder:
        return experiments[_ARGUMENTS.value[0]](Path(folder), _COUNT.value, _SEED.value)


def kill_runs(folder: Path, count: int, seed: int) -> int:
    """Kills and resumes `count` runs; 1 if one ends otherwise than a run left alone."""
    started = time.monotonic()
    train(folder, folder / "alone")
    seconds = time.monotonic() - started
    expected = final_checkpoint(folder / "alone")

    def run(number: int) -> tuple[bool, str | None]:
        return _kill_and_resume(
            folder, number, random.Random(f"{seed} {number}"), seconds, expected
        )

    with concurrent.futures.ThreadPoolExecutor(_PARALLEL) as pool:
        results = []
        for number, result in enumerate(pool.map(run, range(count))):
            results.append(result)
            where = "inside a save" if result[0] else "between saves"
            print(f"run {number}: killed {where}: {result[1] or 'same bytes'}", flush=True)
    inside = sum(inside for inside, _ in results)
    wrong = sum(difference is not None for _, difference in results)
    print(f"killed {count} runs, {inside} inside a save: {count - wrong} identical, {wrong} wrong")
    return int(wrong > 0 or 2 * inside < count)


def damage_checkpoints(folder: Path, count: int, seed: int) -> int:
    """Damages the newest checkpoint `count` times; 1 if one was missed or not recovered from."""
    draw = random.Random(seed)
    train(folder, folder / "whole")
    steps = CheckpointFolder(str(folder / "whole")).steps()
    before, newest = steps[-2:]
    expected = contents(folder / "whole", before)
    config, tokenizer_json, _ = read_config(str(folder / "whole"))
    detected = recovered = 0
    for number in range(count):
        workdir = folder / "damaged"
        shutil.copytree(folder / "whole" / "checkpoints", workdir / "checkpoints")
        what = _damage(workdir / "checkpoints" / str(newest), draw)
        checkpointer = Checkpointer(str(workdir), config, tokenizer_json, keep_last=2, keep_best=0)
        with contextlib.closing(checkpointer):
            difference = _restore(checkpointer, workdir, expected)
        noticed = (workdir / "checkpoints_damaged" / str(newest)).is_dir()
        detected += noticed
        recovered += difference is None
        if not noticed or difference:
            print(f"damage {number}: {what}: {'' if noticed else 'not detected, '}{difference}")
        shutil.rmtree(workdir)
    print(f"{count} damages: {detected} detected, {recovered} recovered")
    return int(detected < count or recovered < count)


def _kill_and_resume(
    folder: Path, number: int, draw: random.Random, seconds: float, expected: dict[str, Any]
) -> tuple[bool, str | None]:
    """Whether the kill fell inside a save, and what differs at the end, if anything."""
    workdir = folder / f"run{number}"
    process = start(folder, workdir)
    if number % 2 == 0:
        _stop_inside_a_save(process, workdir / "checkpoints", draw)
    else:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(draw.uniform(0, seconds))
    process.kill()
    process.wait()
    inside = _is_saving(workdir / "checkpoints")
    train(folder, workdir)
    if (workdir / "checkpoints_damaged").exists():
        return inside, "a checkpoint was taken for damaged"
    difference = compare(final_checkpoint(workdir), expected)
    shutil.rmtree(workdir)
    return inside, difference


def _stop_inside_a_save(
    process: subprocess.Popen[bytes], checkpoints: Path, draw: random.Random
) -> None:
    """Stops the process at a random moment of a random save; returns too if it ends before."""
    saves_to_pass = draw.randrange(STEPS // SAVE_EVERY - 1)
    was_saving = False
    while process.poll() is None:
        saving = _is_saving(checkpoints)
        if saving and not was_saving:
            saves_to_pass -= 1
        was_saving = saving
        if saving and saves_to_pass < 0:
            time.sleep(draw.uniform(0, 0.05))
            process.send_signal(signal.SIGSTOP)
            if _is_saving(checkpoints):
                return
            process.send_signal(signal.SIGCONT)
            was_saving = False
        time.sleep(0.001)


def _is_saving(checkpoints: Path) -> bool:
    """Whether a checkpoint lies there that is not complete yet."""
    try:
        names = os.listdir(checkpoints)
    except FileNotFoundError:
        return False
    return any(
        UNFINISHED_MARK in name
        or (name.isdecimal() and not manifest.has_manifest(str(checkpoints / name)))
        for name in names
    )


def _damage(step_path: Path, draw: random.Random) -> str:
    """Damages one file at random; returns what was done."""
    file = draw.choice(sorted(path for path in step_path.rglob("*") if path.is_file()))
    content = bytearray(file.read_bytes())
    kind = draw.choice(["flip", "truncate", "delete"]) if content else "delete"
    position = draw.randrange(len(content)) if content else 0
    if kind == "delete":
        file.unlink()
    elif kind == "truncate":
        file.write_bytes(content[:position])
    else:
        content[position] ^= 1 << draw.randrange(8)
        file.write_bytes(content)
    return f"{kind} {file.relative_to(step_path)} at {position}"


def _restore(checkpointer: Checkpointer, workdir: Path, expected: dict[str, Any]) -> str | None:
    """What is wrong with what is restored from `workdir`, if anything."""
    path = CheckpointFolder(str(workdir)).step_path(expected["step"])
    restored = checkpointer.restore(
        {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
            for name, leaf in saved_leaves(path).items()
        }
    )
    if restored is None:
        return "nothing was restored"
    found = comparable(restored.step, restored.data_state, restored.state)
    return compare(found, expected)


if __name__ == "__main__":
    command_line.run(main)
