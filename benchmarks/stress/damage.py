"""Damage to files of a run: nothing wrong is ever used, and nothing hangs."""

import faulthandler
import functools
import os
import random
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from simplernn_jax import load_model
from simplernn_jax.checkpoint.folder import CheckpointFolder
from simplernn_jax.compilation_cache import ChecksummedCache
from simplernn_jax.data.token_store import TokenizedCorpus, prepare_corpus
from simplernn_jax.errors import UserError
from simplernn_jax.export.formats import TrainedModel, find_format
from simplernn_jax.inference import generate
from simplernn_jax.inference.exported_folder import load_exported
from simplernn_jax.inference.state_file import load_state, save_state
from simplernn_jax.models import LanguageModel

from .experiment import Case
from .in_process import outcome, quiet, run_quietly, small_config
from .runs import bytes_of, difference, read_checkpoint

_HANG_SECONDS = 120.0
"""A case that takes longer ends the process with its stack: the call hangs."""
_STEPS = 12
"""Steps of the run, which saves every third one."""
_RESUMED = 6
"""One case in so many resumes the run, which takes longer than to load its model."""
_C_CODE, _C_CODE_EVERY = "C code", 20
"""One store in so many is the C code, which is loaded in a process of its own."""
_USES_C = """
import numpy as np
from simplernn_jax.ops.rms_norm import rms_norm
x = np.random.default_rng(0).normal(size=(7, 99)).astype(np.float32)
print(np.asarray(rms_norm(x, native=True)).tobytes().hex())
"""


def workdir(folder: Path, count: int, seed: int) -> Iterator[Case]:
    """Damage one to three files of a workdir; then load its model, or run it to the end again."""
    config = small_config(folder, steps=_STEPS, save_every=3, eval_every=3)
    whole, damaged = folder / "whole", folder / "damaged"
    run_quietly(config, whole)
    expected = read_checkpoint(whole)
    steps = CheckpointFolder(str(whole)).steps()
    models = {_parameters(load_model(str(whole), step)[0]) for step in steps}

    def load() -> str | None:
        found = outcome(lambda: load_model(str(damaged))[0])
        is_right = isinstance(found, str) or _parameters(found) in models
        return None if is_right else "other parameters than those of any checkpoint"

    def resume() -> str | None:
        found = outcome(lambda: run_quietly(config, damaged))
        if isinstance(found, str):
            return None
        return difference(read_checkpoint(damaged), expected)

    for number in range(count):
        draw = random.Random(f"{seed} {number}")
        shutil.copytree(whole, damaged)
        is_resumed = number % _RESUMED == 0
        # Where the newest checkpoint is intact, a resumed run has nothing to do.
        newest = damaged / "checkpoints" / str(_STEPS)
        folders = [newest if is_resumed else damaged, damaged, damaged]
        what = " and ".join(damage_file(f, draw) for f in folders[: draw.choice([1, 1, 2, 3])])
        problem = _watched(resume if is_resumed else load)
        yield Case(f"{number}: {what}", problem, "resumed" if is_resumed else "loaded")
        shutil.rmtree(damaged)


class _Store(NamedTuple):
    """Files that are made, damaged and read."""

    folder: Path
    write: Callable[[], Any]
    """Make the files of the folder, which is empty."""
    read: Callable[[], Any]
    """Read them; raises `UserError` to refuse them."""

    def write_again(self) -> None:
        """Make the files anew."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        self.write()

    def damage(self, draw: random.Random) -> str:
        """Make the files anew and damage one of them; return a description."""
        while True:
            self.write_again()
            whole = _contents(self.folder)
            what = damage_file(self.folder, draw)
            if _contents(self.folder) != whole:  # not a file that was swapped with itself
                return what

    def difference(self, expected: Any) -> str | None:
        """Say whether the files hold something else; to refuse them is right."""
        found = outcome(self.read)
        return None if isinstance(found, str) or found == expected else "another content"


def stores(folder: Path, count: int, seed: int) -> Iterator[Case]:
    """Damage token stores, decoder states, programs, exports and C code; then read them."""
    kinds = _make_stores(folder)
    expected = {}
    for kind, store in kinds.items():
        store.write_again()
        expected[kind] = store.read()
    names = [kind for kind in kinds if kind != _C_CODE]
    for number in range(count):
        draw = random.Random(f"{seed} {number}")
        is_c_code = number % _C_CODE_EVERY == _C_CODE_EVERY - 1
        kind = _C_CODE if is_c_code else names[number % len(names)]
        what = kinds[kind].damage(draw)
        problem = _watched(functools.partial(kinds[kind].difference, expected[kind]))
        yield Case(f"{number}: {kind}, {what}", problem, kind)


def _make_stores(folder: Path) -> dict[str, _Store]:
    """Make all kinds of stores, of a small run."""
    config = small_config(folder, steps=1)
    run_quietly(config, folder / "run")
    model, tokenizer, _ = load_model(str(folder / "run"))
    state = generate(model, [1, 2, 3], max_new_tokens=5).state
    tokens, states = folder / "tokens", folder / "states"
    programs, exported = folder / "programs", folder / "exported"

    def read_tokens() -> list[bytes]:
        return _tokens_of(prepare_corpus(config.data, 0, str(tokens), show_progress=False))

    def write_state() -> None:
        save_state(str(states / "state"), state, model, tokenizer)

    def read_state() -> tuple[bytes, ...]:
        return bytes_of(vars(load_state(str(states / "state"), model, tokenizer)))

    def write_program() -> None:
        ChecksummedCache(programs, 1 << 20).put("key", b"program" * 999)

    def read_program() -> bytes:
        found = ChecksummedCache(programs, 1 << 20).get("key")
        if found is None:
            raise UserError("compiled again")
        return found

    def write_export() -> None:
        trained = TrainedModel(model, tokenizer, config, str(folder / "run"))
        find_format("safetensors").write(trained, exported)
        (exported / "config.json").unlink()  # for other programs

    def read_export() -> tuple[Any, ...]:
        model, tokenizer, config = load_exported(str(exported))
        return _parameters(model), tokenizer.to_json(), config

    return {
        "tokens": _Store(tokens, read_tokens, read_tokens),
        "state": _Store(states, write_state, read_state),
        "program": _Store(programs, write_program, read_program),
        "export": _Store(exported, write_export, read_export),
        _C_CODE: _native_library(folder / "native"),
    }


def _native_library(folder: Path) -> _Store:
    """Make a store of the compiled C functions, which a process of its own loads."""
    folder.mkdir()
    cache, whole, compiler = folder / "cache", folder / "whole", folder / "compiler"
    environment = os.environ | {"XDG_CACHE_HOME": str(cache), "CC": str(compiler)}
    # Compiles once; after that it only copies.
    copies = f'if test -e {folder}/native.so; then cp {folder}/native.so "$last"; exit; fi'
    lines = ["#!/bin/sh", 'case "$1" in --version) exec cc "$@" ;; esac', "for last; do :; done"]
    compiler.write_text("\n".join([*lines, copies, 'exec cc "$@"', ""]))
    compiler.chmod(0o755)

    def read() -> bytes:
        return subprocess.run(
            [sys.executable, "-c", _USES_C],
            check=True,
            env=environment,
            capture_output=True,
            timeout=_HANG_SECONDS / 2,
        ).stdout

    read()
    (library,) = cache.rglob("*.so")
    shutil.copy(library, folder / "native.so")
    cache.rename(whole)
    return _Store(cache, lambda: shutil.copytree(whole, cache, dirs_exist_ok=True), read)


def _contents(folder: Path) -> dict[str, bytes | None]:
    """Content of each regular file below `folder`; None for anything else."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if _is_regular(path) else None
        for path in folder.rglob("*")
    }


def damage_file(folder: Path, draw: random.Random) -> str:
    """Damage one file below `folder`, and nothing beside it; return a description."""
    files = _files(folder)
    if not files:
        return "no file is left"
    path = draw.choice(files)
    kind = draw.choice(list(_DAMAGES))
    _DAMAGES[kind](path, folder, draw)
    return f"{kind} {path.relative_to(folder)}"


def _files(folder: Path) -> list[Path]:
    return sorted(filter(_is_regular, folder.rglob("*")))


def _is_regular(path: Path) -> bool:
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
    "put a FIFO in place of": _replace(os.mkfifo),
}


def _watched(check: Callable[[], str | None]) -> str | None:
    """Problem that `check` finds, or its unexpected exception; a hang ends the process."""
    faulthandler.dump_traceback_later(_HANG_SECONDS, exit=True)
    try:
        with quiet():
            return check()
    except Exception:
        return traceback.format_exc().strip()
    finally:
        faulthandler.cancel_dump_traceback_later()


def _parameters(model: LanguageModel) -> tuple[bytes, ...]:
    return bytes_of(nnx.state(model, nnx.Param))


def _tokens_of(corpus: TokenizedCorpus) -> list[bytes]:
    return [
        np.asarray(split.tokens).tobytes()
        for split in (corpus.train, corpus.validation)
        if split is not None
    ]
