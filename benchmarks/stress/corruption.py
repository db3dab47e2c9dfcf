"""Corrupt files of runs and stores: nothing wrong is ever used, and nothing hangs."""

import os
import random
import shutil
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from simplernn_jax import load_model
from simplernn_jax.checkpoint.folder import CheckpointFolder
from simplernn_jax.config import Config
from simplernn_jax.data.token_store import prepare_corpus
from simplernn_jax.data.tokenizer import Tokenizer
from simplernn_jax.errors import UserError
from simplernn_jax.export.formats import TrainedModel, find_format
from simplernn_jax.inference import generate
from simplernn_jax.inference.loading import RUN, WEIGHTS, load_exported
from simplernn_jax.inference.state import load_state, save_state
from simplernn_jax.models import LanguageModel

from . import Case, run_cases
from .runs import bytes_of, quiet, read_checkpoint, run_quietly, small_config

_STEPS = 12
"""Steps of the run, which saves every third one."""
_RESUMED = 6
"""One case in this many resumes the run, which takes longer than to load its model."""
_NEEDED = ("checkpoints/", "config.json")
"""Corruption that may be rejected; all other files are for readers of the results."""


class _Store(NamedTuple):
    """Files that are copied, corrupted and read; `read` raises `UserError` to reject them."""

    whole: Path
    corrupt: Path
    read: Callable[[Path], Any]
    allowed: list[Any]

    def check(self, draw: random.Random, *folders: Path) -> tuple[str, str | None, str | None]:
        """Corrupt a file in each of the folders of a copy, and read it.

        Returns a description, the error that rejects it, and the problem.
        """
        shutil.rmtree(self.corrupt, ignore_errors=True)
        shutil.copytree(self.whole, self.corrupt)
        what = " and ".join(corrupt_file(folder, draw, self.corrupt) for folder in folders)
        message, problem = None, None
        try:
            with quiet():
                found = self.read(self.corrupt)
            problem = None if found in self.allowed else "another content"
        except UserError as error:
            message = str(error)
            problem = None if len(message.splitlines()) == 1 else f"an error {message!r}"
        except Exception:
            problem = traceback.format_exc().strip()
        return what, message, problem


def corruption(folder: Path, count: int, seed: int) -> Iterator[Case]:
    """Corrupt files of a workdir are repaired, recovered from or rejected in one line.

    One to three files are corrupted; then the model is loaded, or the run resumed to its end.
    """
    config = small_config(folder, steps=_STEPS, save_every=3, eval_every=3)
    whole, corrupt = folder / "whole", folder / "corrupt"
    run_quietly(config, whole)

    def load(path: Path, step: Any = "best") -> Any:
        return contents_of(load_model(str(path), step))

    def resume(path: Path) -> dict[str, Any]:
        run_quietly(config, path)
        return read_checkpoint(path)

    models = [load(whole, step) for step in CheckpointFolder(str(whole)).steps()]
    loaded = _Store(whole, corrupt, load, models)
    resumed = _Store(whole, corrupt, resume, [read_checkpoint(whole)])

    def run_case(number: int, draw: random.Random) -> Case:
        is_resumed = number % _RESUMED == 0
        # Where the newest checkpoint is intact, a resumed run has nothing to do.
        newest = corrupt / "checkpoints" / str(_STEPS)
        folders = [newest if is_resumed else corrupt, corrupt, corrupt]
        store = resumed if is_resumed else loaded
        what, error, problem = store.check(draw, *folders[: draw.choice([1, 1, 2, 3])])
        if error and not any(place in what for place in _NEEDED):
            problem = f"rejected without need: {error}"
        kind = f"{'resumed' if is_resumed else 'loaded'}{', rejected' if error else ''}"
        return Case(f"{number}: {what}", problem, kind)

    return run_cases(run_case, count, seed)


def stores(folder: Path, count: int, seed: int) -> Iterator[Case]:
    """Corrupt token stores, decoder states and exports are never used."""
    kinds = _make_stores(folder)

    def run_case(number: int, draw: random.Random) -> Case:
        kind = list(kinds)[number % len(kinds)]
        what, _, problem = kinds[kind].check(draw, kinds[kind].corrupt)
        return Case(f"{number}: {kind}, {what}", problem, kind)

    return run_cases(run_case, count, seed)


def _make_stores(folder: Path) -> dict[str, _Store]:
    """Make all kinds of stores, of a small run."""
    config = small_config(folder, steps=1)
    run_quietly(config, folder / "run")
    model, tokenizer, _ = load_model(str(folder / "run"))

    def read_tokens(path: Path) -> list[bytes]:
        corpus = prepare_corpus(config.data, 0, str(path))
        splits = (corpus.train, corpus.validation)
        return [np.asarray(split.tokens).tobytes() for split in splits if split is not None]

    def read_state(path: Path) -> tuple[bytes, ...]:
        return bytes_of(vars(load_state(str(path / "state"), model, tokenizer)))

    def read_export(path: Path) -> Any:
        return contents_of(load_exported(str(path)))

    reads = {"tokens": read_tokens, "state": read_state, "export": read_export}
    whole = {name: folder / name / "whole" for name in reads}
    for path in whole.values():
        path.mkdir(parents=True)
    state = generate(model, [1, 2, 3], max_new_tokens=5).state
    save_state(str(whole["state"] / "state"), state, model, tokenizer)
    trained = TrainedModel(model, tokenizer, config, str(folder / "run"))
    find_format("safetensors").write(trained, whole["export"])
    for path in whole["export"].iterdir():
        if path.name not in (RUN, WEIGHTS):  # for other programs
            path.unlink()
    return {
        name: _Store(whole[name], folder / name / "corrupt", read, [read(whole[name])])
        for name, read in reads.items()
    }


def corrupt_file(folder: Path, draw: random.Random, top: Path | None = None) -> str:
    """Change one file below `folder`, and nothing else; return a description.

    It names the file relative to `top`, by default the folder. A file may be swapped with an equal
    one.
    """
    files = sorted(p for p in folder.rglob("*") if p.is_file() and not p.is_symlink())
    if not files:
        return "no file is left"
    path, kind = draw.choice(files), draw.choice(_KINDS)
    content = path.read_bytes()
    at = draw.randrange(len(content) + 1)
    others = [file for file in files if file != path]
    # If there is one, the file of another checkpoint.
    other = draw.choice([file for file in others if file.name == path.name] or others or [path])
    description = f"{kind} {path.relative_to(top or folder)}"
    match kind:
        case "flip a bit of":
            flipped = bytes([content[at] ^ 1 << draw.randrange(8)]) if content[at:] else b""
            path.write_bytes(content[:at] + flipped + content[at + 1 :])
        case "truncate":
            path.write_bytes(content[:at])
        case "zero the end of":  # as a file system that lost its last blocks
            path.write_bytes(content[:at] + bytes(len(content) - at))
        case "swap":
            path.write_bytes(other.read_bytes())
        case _:
            path.unlink()
            _REPLACEMENTS[kind](path, other)
    return description


_REPLACEMENTS: dict[str, Callable[[Path, Path], object]] = {
    "delete": lambda path, other: None,
    "put a folder in place of": lambda path, other: path.mkdir(),
    "put a link in place of": lambda path, other: path.symlink_to("/dev/zero"),
    "put a dangling link in place of": lambda path, other: path.symlink_to("nothing"),
    "put a link to another file in place of": lambda path, other: path.symlink_to(other),
    "put a FIFO in place of": lambda path, other: os.mkfifo(path),
}
_KINDS = ("flip a bit of", "truncate", "zero the end of", "swap", *_REPLACEMENTS)


def contents_of(
    loaded: tuple[LanguageModel, Tokenizer, Config],
) -> tuple[tuple[bytes, ...], str, Config]:
    """Parameters, tokenizer and configuration of a loaded model, as values to compare."""
    model, tokenizer, config = loaded
    return bytes_of(nnx.state(model, nnx.Param)), tokenizer.to_json(), config
