"""Decoder state in a safetensors file.

Nothing in the file is executed. Its metadata hold fingerprints of model and tokenizer and a SHA-256
of everything else, so that neither a stale nor a corrupted state is ever used.
"""

import dataclasses
import os
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import nnx

from simplernn_jax.data.tokenizer import Tokenizer
from simplernn_jax.devices import check_memory
from simplernn_jax.errors import UserError
from simplernn_jax.files import open_file, sha256_hex, write_file
from simplernn_jax.inference.arguments import check_model, check_tokenizer, checked_path
from simplernn_jax.inference.state import DecoderState, check_state, state_shapes
from simplernn_jax.models import LanguageModel
from simplernn_jax.named_leaves import named_leaves
from simplernn_jax.safetensors_bytes import decode_metadata, decode_safetensors, digest_of

_FORMAT = "simplernn_jax decoder state"
_VERSION = "1"

_ADVICE = "specify a file that save_state wrote"

_MAX_HEADER_BYTES = 1 << 24
"""Bytes of names and shapes in a file at most; a thousand layers need less than one MB."""


def save_state(path: str, state: DecoderState, model: LanguageModel, tokenizer: Tokenizer) -> None:
    """Save `state` to a file, atomically; an existing regular file is replaced.

    Args:
      path: of the file, usually ending in ``.safetensors``.
      state: any number of sequences.
      model: the one that created the state.
      tokenizer: the one of its tokens.

    Raises:
      UserError: `path` cannot be written or is something else than a regular file, or the state
        does not fit the model.
    """
    path = checked_path(path)
    check_model(model)
    check_tokenizer(tokenizer, "to_json")
    check_state(model, state)
    try:
        write_file(path, encode_state(state, fingerprints(model, tokenizer)))
    except OSError as error:
        raise UserError(
            f"{path}: the state cannot be written ({error.strerror}); specify a file in a "
            "writable folder with free space"
        ) from error


def load_state(path: str, model: LanguageModel, tokenizer: Tokenizer) -> DecoderState:
    """Load a state that `save_state` saved, bit-exactly.

    Args:
      path: of the file.
      model: of the same parameters and configuration as the one that created the state.
      tokenizer: equal to the one that the state was saved with.

    Raises:
      UserError: no regular file, not a state, corrupted, larger than memory, of another version of
        the format, of another model or of another tokenizer.
    """
    path = checked_path(path)
    check_model(model)
    check_tokenizer(tokenizer, "to_json")
    try:
        with open_file(path) as file:
            size = file.read(8)
            names = file.read(min(int.from_bytes(size, "little"), _MAX_HEADER_BYTES))
            _metadata(path, size + names)
            num_bytes = os.fstat(file.fileno()).st_size
            check_memory(num_bytes, path, "load it on a larger machine")
            content = b"".join((size, names, file.read(num_bytes)))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); {_ADVICE}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: corrupted, or not a state ({error}); {_ADVICE}") from error
    state, _ = decode_state(path, content, model, fingerprints(model, tokenizer))
    return jax.tree.map(jnp.array, state)


def encode_state(state: DecoderState, fingerprints: Mapping[str, str], **notes: str) -> bytes:
    """Make the content of a state file; `notes` are more entries of its signed metadata."""
    arrays = {name: np.ascontiguousarray(leaf) for name, leaf in named_leaves(state).items()}
    header = {"format": _FORMAT, "version": _VERSION, **notes, **fingerprints}
    header["sha256"] = digest_of(header, arrays)
    return safetensors.numpy.save(arrays, header)


def decode_state(
    where: str, content: bytes, model: LanguageModel, fingerprints: Mapping[str, str]
) -> tuple[DecoderState, dict[str, str]]:
    """Decode a state file to arrays and metadata; `UserError` begins with `where`."""
    try:
        header = _metadata(where, content)
        arrays = decode_safetensors(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: corrupted, or not a state ({error}); {_ADVICE}") from error
    signed = {name: value for name, value in header.items() if name != "sha256"}
    if header.get("sha256") != digest_of(signed, arrays):
        raise UserError(f"{where}: corrupted; use another copy, or prefill its text again")
    for name, fingerprint in fingerprints.items():
        if header.get(name) != fingerprint:
            raise UserError(
                f"{where}: the state is of another {name}; use the one that it was saved with (of "
                "another checkpoint of the run: --checkpoint=STEP), or prefill its text again"
            )
    structure = state_shapes(model, 1)
    names = named_leaves(structure)
    if arrays.keys() != names.keys():
        raise UserError(f"{where}: holds other arrays than a state; {_ADVICE}")
    leaves = [arrays[name] for name in names]
    state: DecoderState = jax.tree.unflatten(jax.tree.structure(structure), leaves)
    check_state(model, state, where)
    if np.max(state.recent, initial=-1) >= model.config.vocab_size:
        raise UserError(f"{where}: holds token ids that this model does not have; {_ADVICE}")
    return state, header


def _metadata(path: str, content: bytes) -> dict[str, str]:
    """Parse the metadata; ValueError if not JSON, `UserError` if not a state of this version."""
    metadata = decode_metadata(content)
    if metadata.get("format") != _FORMAT:
        raise UserError(f"{path}: holds no state; {_ADVICE}")
    if metadata.get("version") != _VERSION:
        raise UserError(
            f"{path}: version {metadata.get('version')} of the format, and this program supports "
            f"{_VERSION}; use the program that wrote it, or prefill its text again"
        )
    return metadata


def fingerprints(model: LanguageModel, tokenizer: Tokenizer) -> dict[str, str]:
    """Digests of the parameters and the tokenizer that a state belongs to."""
    parameters = named_leaves(nnx.state(model, nnx.Param))
    return {
        "model": digest_of(dataclasses.asdict(model.config), parameters),
        "tokenizer": sha256_hex(tokenizer.to_json()),
    }
