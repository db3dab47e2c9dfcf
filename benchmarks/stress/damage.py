"""Damage to files of a run: nothing wrong is ever used, and nothing hangs."""

import faulthandler
import os
import random
import shutil
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from flax import nnx

from simplernn_jax import load_model
from simplernn_jax.checkpoint.folder import CheckpointFolder
from simplernn_jax.config import Config
from simplernn_jax.data.tokenizer import Tokenizer
from simplernn_jax.models import LanguageModel

from .experiment import Case
from .in_process import outcome, quiet, run_quietly, small_config
from .runs import bytes_of, difference, read_checkpoint

HANG_SECONDS = 120.0
"""A case that takes longer ends the process with its stack: the call hangs."""
_STEPS = 12
"""Steps of the run, which saves every third one."""
_RESUMED = 6
"""One case in this many resumes the run, which takes longer than to load its model."""
_NEEDED = ("checkpoints/", "config.json", "swap the folder")
"""Damage that may be refused, also of a folder that was swapped with that of the checkpoints; all
other files are for readers of the results."""


def workdir(folder: Path, count: int, seed: int) -> Iterator[Case]:
    """Damage one to three files of a workdir; then load its model, or run it to the end again."""
    config = small_config(folder, steps=_STEPS, save_every=3, eval_every=3)
    whole, damaged = folder / "whole", folder / "damaged"
    run_quietly(config, whole)
    expected = read_checkpoint(whole)
    steps = CheckpointFolder(str(whole)).steps()
    models = [contents_of(load_model(str(whole), step)) for step in steps]
    refusals: list[str] = []

    def load() -> str | None:
        found = outcome(lambda: load_model(str(damaged)))
        if isinstance(found, str):
            refusals.append(found)
            return None
        is_right = contents_of(found) in models
        return None if is_right else "another model than that of any checkpoint"

    def resume() -> str | None:
        found = outcome(lambda: run_quietly(config, damaged))
        if isinstance(found, str):
            refusals.append(found)
            return None
        return difference(read_checkpoint(damaged), expected)

    for number in range(count):
        draw = random.Random(f"{seed} {number}")
        shutil.copytree(whole, damaged)
        is_resumed = number % _RESUMED == 0
        # Where the newest checkpoint is intact, a resumed run has nothing to do.
        newest = damaged / "checkpoints" / str(_STEPS)
        folders = [newest if is_resumed else damaged, damaged, damaged]
        whats = [damage_file(f, draw, damaged) for f in folders[: draw.choice([1, 1, 2, 3])]]
        refusals.clear()
        problem = watched(resume if is_resumed else load)
        if refusals and not any(place in what for place in _NEEDED for what in whats):
            problem = f"refused without need: {refusals[0]}"
        kind = f"{'resumed' if is_resumed else 'loaded'}{', refused' if refusals else ''}"
        yield Case(f"{number}: {' and '.join(whats)}", problem, kind)
        shutil.rmtree(damaged)


def damage_file(folder: Path, draw: random.Random, top: Path | None = None) -> str:
    """Change one file below `folder`, and nothing beside it; return a description.

    It names the file relative to `top`, by default the folder.
    """
    whole = _files_in(folder)
    while True:
        files = _files(folder)
        if not files:
            return "no file is left"
        path = draw.choice(files)
        kind = draw.choice(list(_DAMAGES))
        _DAMAGES[kind](path, folder, draw)
        if _files_in(folder) != whole:  # not a file that was swapped with itself
            return f"{kind} {path.relative_to(top or folder)}"


def _files_in(folder: Path) -> dict[str, bytes | str | None]:
    """Content of each file below `folder`, target of each link; None for anything else."""
    return {
        str(path.relative_to(folder)): os.readlink(path)
        if path.is_symlink()
        else path.read_bytes()
        if _is_regular(path)
        else None
        for path in folder.rglob("*")
    }


def contents_of(
    loaded: tuple[LanguageModel, Tokenizer, Config],
) -> tuple[tuple[bytes, ...], str, Config]:
    """Parameters, tokenizer and configuration of a loaded model, as values to compare."""
    model, tokenizer, config = loaded
    return bytes_of(nnx.state(model, nnx.Param)), tokenizer.to_json(), config


def _files(folder: Path) -> list[Path]:
    return sorted(filter(_is_regular, folder.rglob("*")))


def _is_regular(path: Path) -> bool:
    """Return whether `path` is a regular file, and no link to one."""
    return path.is_file() and not path.is_symlink()


def _flip(path: Path, folder: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    if content:
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def _truncate(path: Path, folder: Path, draw: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: draw.randrange(len(content) + 1)])


def _zero(path: Path, folder: Path, draw: random.Random) -> None:
    """Overwrite a part by zeros, as a file system that lost its last blocks."""
    content = bytearray(path.read_bytes())
    start = draw.randrange(len(content) + 1)
    content[start:] = bytes(len(content) - start)
    path.write_bytes(content)


def _swap(path: Path, folder: Path, draw: random.Random) -> None:
    """Replace by another file, if there is one by that of another checkpoint."""
    files = _files(folder)
    alike = [other for other in files if other.name == path.name and other != path]
    path.write_bytes(draw.choice(alike or files).read_bytes())


def _swap_folders(path: Path, folder: Path, draw: random.Random) -> None:
    """Exchange the folder of the file with its neighbor, if it is below `folder`."""
    if path.parent == folder:
        return
    neighbors = sorted(p for p in path.parent.parent.iterdir() if p.is_dir() and p != path.parent)
    if not neighbors:
        return
    other, aside = draw.choice(neighbors), path.parent.with_name("aside")
    path.parent.rename(aside)
    other.rename(path.parent)
    aside.rename(other)


def _link(path: Path, folder: Path, draw: random.Random) -> None:
    """Replace by a link to another file, if there is one to that of another checkpoint."""
    files = [other for other in _files(folder) if other != path]
    alike = [other for other in files if other.name == path.name]
    if files:
        path.unlink()
        path.symlink_to(draw.choice(alike or files))


def _replace(make: Callable[[Path], Any]) -> Callable[[Path, Path, random.Random], None]:
    def replace(path: Path, folder: Path, draw: random.Random) -> None:
        path.unlink()
        make(path)

    return replace


_DAMAGES: dict[str, Callable[[Path, Path, random.Random], None]] = {
    "flip a bit of": _flip,
    "truncate": _truncate,
    "zero the end of": _zero,
    "delete": _replace(lambda path: None),
    "swap": _swap,
    "swap the folder of": _swap_folders,
    "put a folder in place of": _replace(os.mkdir),
    "put a link in place of": _replace(lambda path: os.symlink("/dev/zero", path)),
    "put a dangling link in place of": _replace(lambda path: os.symlink("nothing", path)),
    "put a link to another file in place of": _link,
    "put a FIFO in place of": _replace(os.mkfifo),
}


def watched(check: Callable[[], str | None]) -> str | None:
    """Problem that `check` finds, or its unexpected exception; a hang ends the process."""
    faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
    try:
        with quiet():
            return check()
    except Exception:
        return traceback.format_exc().strip()
    finally:
        faulthandler.cancel_dump_traceback_later()
