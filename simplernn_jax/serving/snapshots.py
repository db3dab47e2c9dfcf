"""The prefix cache in a folder, from one process of the server to the next.

It is kept where a C function decodes the model: what its bits depend on is known.
"""

import dataclasses
import os
from pathlib import Path

import jax
import numpy as np
from absl import logging

from simplernn_jax.data.tokenizer import Tokenizer
from simplernn_jax.errors import UserError, counted
from simplernn_jax.files import SMALL_FILE, read_file, write_file
from simplernn_jax.inference.decoder_weights import decodes_natively
from simplernn_jax.inference.engine import PrefixState
from simplernn_jax.inference.state import decode_state, empty_state, encode_state, fingerprints
from simplernn_jax.models import LanguageModel
from simplernn_jax.ops.native import native_fingerprint
from simplernn_jax.serving.scheduler import Scheduler

STATES_PER_FILE = 64


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
    return sorted(folder.glob(f"{9 * '[0-9]'}.safetensors"))


def _owner(model: LanguageModel, tokenizer: Tokenizer) -> dict[str, str]:
    """Digests of what the bits of a state depend on."""
    return {**fingerprints(model, tokenizer), "machine or compiler": native_fingerprint()}
