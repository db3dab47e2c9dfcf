"""A decoder's state in a file.

A file is in the safetensors format; nothing in it is executed. Its metadata name the model and the
tokenizer it belongs to and hold a SHA-256 of everything else, so that neither a stale state nor a
damaged one is ever taken for a good one.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import nnx

from simplernn_jax.data.tokenizer import Tokenizer
from simplernn_jax.devices import check_memory
from simplernn_jax.errors import UserError
from simplernn_jax.files import open_file, write_file
from simplernn_jax.inference.arguments import check_model, check_tokenizer, checked_path
from simplernn_jax.inference.state import DecoderState, check_state, empty_state
from simplernn_jax.models import LanguageModel
from simplernn_jax.named_leaves import named_leaves
from simplernn_jax.safetensors_bytes import decode_safetensors

_FORMAT = "simplernn_jax decoder state"
_VERSION = "1"

_ADVICE = "name a file that save_state wrote"

_LONGEST_HEADER = 1 << 24
"""Bytes of names and shapes in a file, at most; a thousand layers need less than one MB."""


def save_state(path: str, state: DecoderState, model: LanguageModel, tokenizer: Tokenizer) -> None:
    """Saves `state` to a file, atomically; a regular file that is there is replaced.

    Args:
      path: of the file, usually ending in ``.safetensors``.
      state: rows of any number.
      model: the one that made the state.
      tokenizer: the one its tokens are of.

    Raises:
      UserError: `path` cannot be written or holds something else than a regular file, or the state
        does not fit the model.
    """
    path = checked_path(path)
    check_model(model)
    check_tokenizer(tokenizer, "to_json")
    check_state(model, state)
    arrays = {name: np.ascontiguousarray(leaf) for name, leaf in named_leaves(state).items()}
    header = {"format": _FORMAT, "version": _VERSION, **_fingerprints(model, tokenizer)}
    header["sha256"] = _digest(header, arrays)
    try:
        write_file(path, safetensors.numpy.save(arrays, header))
    except OSError as error:
        raise UserError(
            f"{path}: the state cannot be written ({error.strerror}); name a file in a folder that "
            "can be written and has room"
        ) from error


def load_state(path: str, model: LanguageModel, tokenizer: Tokenizer) -> DecoderState:
    """Loads what `save_state` saved; going on from it is going on from what was saved.

    Args:
      path: of the file.
      model: with the parameters and the configuration of the one that made the state.
      tokenizer: equal to the one that the state was saved with.

    Raises:
      UserError: no regular file, not a state, damaged, larger than memory, of another version of
        the format, of another model or of another tokenizer.
    """
    path = checked_path(path)
    check_model(model)
    check_tokenizer(tokenizer, "to_json")
    header, arrays = _read(path)
    for name, fingerprint in _fingerprints(model, tokenizer).items():
        if header.get(name) != fingerprint:
            raise UserError(
                f"{path}: the state is of another {name}; use the one that it was saved with, or "
                "read its text again"
            )
    structure = jax.eval_shape(lambda: empty_state(model, 1))
    names = named_leaves(structure)
    if arrays.keys() != names.keys():
        raise UserError(f"{path}: holds other arrays than a state; {_ADVICE}")
    state: DecoderState = jax.tree.unflatten(
        jax.tree.structure(structure), [arrays[name] for name in names]
    )
    check_state(model, state, path)
    return jax.tree.map(jnp.array, state)


def _read(path: str) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """Metadata and arrays of the file at `path`, which is whole."""
    try:
        with open_file(path) as file:
            size = file.read(8)
            names = file.read(min(int.from_bytes(size, "little"), _LONGEST_HEADER))
            header = _metadata(path, names)
            num_bytes = os.fstat(file.fileno()).st_size
            check_memory(num_bytes, path, "load it on a larger machine")
            content = b"".join((size, names, file.read(num_bytes)))
        arrays = decode_safetensors(content)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); {_ADVICE}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged, or no state ({error}); {_ADVICE}") from error
    signed = {name: value for name, value in header.items() if name != "sha256"}
    if header.get("sha256") != _digest(signed, arrays):
        raise UserError(f"{path}: damaged; use another copy, or read its text again")
    return header, arrays


def _metadata(path: str, names: bytes) -> dict[str, str]:
    """What the header of a file says of all arrays, if this version of the program can read it.

    Raises:
      ValueError: it is no JSON.
      UserError: the file is no state, or one of another version.
    """
    header = json.loads(names)
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or metadata.get("format") != _FORMAT:
        raise UserError(f"{path}: holds no state; {_ADVICE}")
    if metadata.get("version") != _VERSION:
        raise UserError(
            f"{path}: version {metadata.get('version')} of the format, and this program knows "
            f"{_VERSION}; use the program that wrote it, or read its text again"
        )
    return metadata


def _fingerprints(model: LanguageModel, tokenizer: Tokenizer) -> dict[str, str]:
    parameters = named_leaves(nnx.state(model, nnx.Param))
    return {
        "model": _digest(dataclasses.asdict(model.config), parameters),
        "tokenizer": hashlib.sha256(tokenizer.to_json().encode()).hexdigest(),
    }


def _digest(header: Mapping[str, Any], arrays: Mapping[str, Any]) -> str:
    """SHA-256 hex over a JSON-able header and the names, dtypes, shapes and bytes of arrays."""
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name, array in sorted(arrays.items()):
        array = np.asarray(array)
        digest.update(f"\n{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
