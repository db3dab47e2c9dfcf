"""Damage to stores: tokens, decoder states, programs, exports and compiled C code."""

import functools
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from simplernn_jax import load_model
from simplernn_jax.compilation_cache import ChecksummedCache
from simplernn_jax.data.token_store import TokenizedCorpus, prepare_corpus
from simplernn_jax.errors import UserError
from simplernn_jax.export.formats import TrainedModel, find_format
from simplernn_jax.inference import generate
from simplernn_jax.inference.loading import RUN, WEIGHTS, load_exported
from simplernn_jax.inference.state import load_state, save_state

from .damage import HANG_SECONDS, contents_of, damage_file, watched
from .experiment import Case
from .in_process import outcome, run_quietly, small_config
from .runs import bytes_of

_C_CODE, _C_CODE_EVERY = "C code", 20
"""One store in this many is the C code, which is loaded in a process of its own."""
_USES_C = """
import numpy as np
from simplernn_jax.ops.rms_norm import rms_norm
x = np.random.default_rng(0).normal(size=(7, 99)).astype(np.float32)
print(np.asarray(rms_norm(x, native=True)).tobytes().hex())
"""


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
        self.write_again()
        return damage_file(self.folder, draw)

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
        problem = watched(functools.partial(kinds[kind].difference, expected[kind]))
        yield Case(f"{number}: {kind}, {what}", problem, kind)


def _make_stores(folder: Path) -> dict[str, _Store]:
    """Make all kinds of stores, of a small run."""
    config = small_config(folder, steps=1)
    run_quietly(config, folder / "run")
    model, tokenizer, _ = load_model(str(folder / "run"))
    state = generate(model, [1, 2, 3], max_new_tokens=5).state
    tokens, states = folder / "tokens", folder / "states"
    programs = folder / "programs"

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

    trained = TrainedModel(model, tokenizer, config, str(folder / "run"))
    has_transformers = find_spec("torch") is not None and find_spec("transformers") is not None
    formats = ["safetensors", "huggingface"] if has_transformers else ["safetensors"]
    exports = {name: _export(trained, name, folder / "exports" / name) for name in formats}
    return {
        "tokens": _Store(tokens, read_tokens, read_tokens),
        "state": _Store(states, write_state, read_state),
        "program": _Store(programs, write_program, read_program),
        **exports,
        _C_CODE: _native_library(folder / "native"),
    }


def _export(trained: TrainedModel, name: str, folder: Path) -> _Store:
    """Make a store of what `load_exported` reads of an export."""
    whole, damaged = folder / "whole", folder / "damaged"
    whole.mkdir(parents=True)
    find_format(name).write(trained, whole)
    for path in whole.iterdir():
        if path.name not in (RUN, WEIGHTS):  # for other programs
            path.unlink()

    return _Store(
        damaged,
        lambda: shutil.copytree(whole, damaged, dirs_exist_ok=True),
        lambda: contents_of(load_exported(str(damaged))),
    )


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
            timeout=HANG_SECONDS / 2,
        ).stdout

    read()
    (library,) = cache.rglob("*.so")
    shutil.copy(library, folder / "native.so")
    cache.rename(whole)
    return _Store(cache, lambda: shutil.copytree(whole, cache, dirs_exist_ok=True), read)


def _tokens_of(corpus: TokenizedCorpus) -> list[bytes]:
    return [
        np.asarray(split.tokens).tobytes()
        for split in (corpus.train, corpus.validation)
        if split is not None
    ]
