"""States in files, those that `simplernn_jax.inference.load_state` loads too.

They are named states, and the prefix cache from one process of the server to the next. The cache is
kept where a C function decodes the model: what its bits depend on is known.
"""

import copy
import dataclasses
import errno
import os
import re
import secrets
import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from simplernn_jax.data.tokenizer import Tokenizer
from simplernn_jax.errors import UserError, counted
from simplernn_jax.files import SMALL_FILE, check_damage, read_file, sha256_hex, write_file
from simplernn_jax.inference.decoder_weights import decodes_natively
from simplernn_jax.inference.engine import PrefixState
from simplernn_jax.inference.state import (
    RECENT_TOKENS,
    decode_state,
    empty_state,
    encode_state,
    fingerprints,
)
from simplernn_jax.models import LanguageModel
from simplernn_jax.ops.native import native_fingerprint
from simplernn_jax.serving.jobs import Job, Prefix
from simplernn_jax.serving.requests import NAME_PATTERN, RequestError
from simplernn_jax.serving.scheduler import Scheduler

_SUFFIX = ".safetensors"
STATES_PER_FILE = 64
"""Maximum number of states in a file of the prefix cache."""


class StateFolder:
    """The states of one model in a folder that exists; files of other models are rejected."""

    def __init__(
        self, folder: str, model: LanguageModel, tokenizer: Tokenizer, max_bytes: int
    ) -> None:
        self._folder = Path(folder)
        self._max_bytes = max_bytes
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._model = model
        self._fingerprints = fingerprints(model, tokenizer)

    def with_model(self, model: LanguageModel) -> "StateFolder":
        """Return the same folder for other parameters, whose states alone can be loaded."""
        other = copy.copy(self)
        other._model = model
        other._fingerprints = fingerprints(model, self._tokenizer)
        return other

    def descriptions(self) -> list[Any]:
        """Describe all states that can be loaded, in the order of their names."""
        described = []
        for path in sorted(self._folder.glob("*" + _SUFFIX)):
            try:
                described.append(self.load(path.name.removesuffix(_SUFFIX)).description)
            except RequestError:
                continue  # corrupt, deleted or of another model
        return described

    def read(self, name: str) -> bytes:
        """Read a file, no link; raises `RequestError`: 404 without one, 400 for a wrong name."""
        try:
            return read_file(self._path(name), self._max_bytes, follow_link=False)
        except OSError as error:
            raise _missing(name, error) from error

    def load(self, name: str) -> Prefix:
        """Load a state; `RequestError`: 404 without one, 409 if corrupt or of another model."""
        return self._decode(name, self.read(name), status=409)

    def add(self, name: str | None, state: PrefixState, job: Job) -> Prefix:
        """Save the state after the prompt of `job`; raises what `put` does."""
        length: int | None = len(job.tokens)
        notes = {}
        if job.prefix is not None:
            parent = job.prefix.description
            notes["parent"] = parent["id"]
            length = None if parent["tokens"] is None else parent["tokens"] + length
        if length is not None:
            notes["length"] = str(length)
        recent = np.full((1, RECENT_TOKENS), -1, np.int32)
        last = job.text[-RECENT_TOKENS:]
        recent[0, RECENT_TOKENS - len(last) :] = last
        saved = dataclasses.replace(
            empty_state(self._model, 1),
            layers=state.layers,
            logits=state.logits,
            recent=jnp.asarray(recent),
        )
        return self.put(name, encode_state(saved, self._fingerprints, **notes))

    def put(self, name: str | None, content: bytes) -> Prefix:
        """Save the content of a file under a new name, by default a random one.

        Raises:
          RequestError: 400 if it is no state of this model, 409 if the name is taken, 507 without
            room.
        """
        name = f"state-{secrets.token_hex(6)}" if name is None else name
        path, saved = self._path(name), self._decode(name, content, status=400)
        with self._lock:
            if os.path.lexists(path):
                raise RequestError(
                    f"state {name!r}: exists already; choose another name", status=409
                )
            try:
                used = sum(os.lstat(other).st_size for other in self._folder.glob("*" + _SUFFIX))
                if used + len(content) > self._max_bytes:
                    raise RequestError("no room for another state; delete some", status=507)
                write_file(path, content)
            except OSError as error:
                raise RequestError(f"state {name!r}: {error.strerror}", status=507) from error
        return saved

    def delete(self, name: str) -> None:
        """Delete a file; raises `RequestError` (404) if it does not exist."""
        with self._lock:
            try:
                os.remove(self._path(name))
            except OSError as error:
                raise _missing(name, error) from error

    def _path(self, name: str) -> Path:
        if not re.fullmatch(NAME_PATTERN, name):
            raise RequestError(f"state {name!r}: a name has the form {NAME_PATTERN}")
        return self._folder / (name + _SUFFIX)

    def _decode(self, name: str, content: bytes, status: int) -> Prefix:
        where = f"state {name!r}"
        try:
            state, header = decode_state(where, content, self._model, self._fingerprints)
            if len(state.position) != 1:
                raise UserError(f"{where}: has {len(state.position)} sequences; save one")
        except UserError as error:
            raise RequestError(str(error), status=status) from error
        length, digest = header.get("length", ""), sha256_hex(content)
        recent = np.asarray(state.recent[0])
        recent = recent[recent >= 0]
        description = {
            "id": name,
            "object": "state",
            "tokens": int(length) if re.fullmatch("[0-9]{1,15}", length) else None,
            "bytes": len(content),
            "sha256": digest,
            "parent": header.get("parent"),
            "text": self._tokenizer.decode(recent),
        }
        prefix = PrefixState(state.layers, state.logits)
        return Prefix(prefix, bytes.fromhex(digest), recent, description)


def _missing(name: str, error: OSError) -> RequestError:
    check_damage(error)
    return RequestError(f"state {name!r} does not exist", status=404)


def save_cache(folder: Path, scheduler: Scheduler, tokenizer: Tokenizer) -> None:
    """Replace the files of `folder`, created if missing, by the states that are cached.

    If that fails, a warning says so, and the rest is not saved.
    """
    model, entries = scheduler.model, scheduler.cache.entries()
    if not decodes_natively(model):
        return
    owner, empty = _owner(model, tokenizer), empty_state(model, 1)
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.is_symlink():
            raise OSError(errno.ELOOP, "is a link", str(folder))
        for path in _files(folder):  # also links, which would be followed
            os.remove(path)
        for start in range(0, len(entries), STATES_PER_FILE):
            keys, states = zip(*entries[start : start + STATES_PER_FILE], strict=True)
            each = [dataclasses.replace(empty, **state._asdict()) for state in states]
            saved = jax.tree.map(lambda *parts: np.concatenate(parts), *each)
            content = encode_state(saved, owner, keys=" ".join(key.hex() for key in keys))
            write_file(folder / f"{start:09}.safetensors", content, durable=False, mode=0o600)
    except OSError as error:
        logging.warning("%s: the prefix cache cannot be saved (%s)", folder, error.strerror)


def load_cache(folder: Path, scheduler: Scheduler, tokenizer: Tokenizer) -> None:
    """Cache the states that `save_cache` saved.

    Files that are corrupt, of another model or another user, or no states, are ignored; one
    warning says how many, and what is wrong with the first one.
    """
    model, cache = scheduler.model, scheduler.cache
    if not decodes_natively(model):
        return
    limit = cache.max_bytes + SMALL_FILE  # it may have been larger
    owner, ignored = _owner(model, tokenizer), []
    for path in _files(folder):  # the least recently used states first
        try:
            content = read_file(path, limit, follow_link=False, only_own=True)
            saved, header = decode_state(str(path), content, model, owner)
            keys = [bytes.fromhex(key) for key in header["keys"].split()]
            states = PrefixState(saved.layers, saved.logits)
            for key, index in zip(keys, range(len(saved.position)), strict=True):
                part = slice(index, index + 1)
                cache.add(key, jax.tree.map(lambda x, part=part: x[part].copy(), states))
        except (OSError, KeyError, ValueError, UserError) as error:
            ignored.append(str(error))
    if ignored:
        number = counted(len(ignored), "file")
        logging.warning("%s: %s of the prefix cache ignored: %s", folder, number, ignored[0])


def _files(folder: Path) -> list[Path]:
    return [] if folder.is_symlink() else sorted(folder.glob(f"{9 * '[0-9]'}.safetensors"))


def _owner(model: LanguageModel, tokenizer: Tokenizer) -> dict[str, str]:
    """Digests of what the bits of a state depend on."""
    return {**fingerprints(model, tokenizer), "machine or compiler": native_fingerprint()}
