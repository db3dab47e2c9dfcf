"""Where rows of text stand, as a value: keep it, fork it, save it to a file and load it.

A file is in the safetensors format; nothing in it is executed. Its metadata name the model and the
tokenizer it belongs to and hold a SHA-256 of everything else, so that neither a stale state nor a
damaged one is ever taken for a good one.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from simplernn_jax.array_types import ModelState
from simplernn_jax.data.tokenizer import Tokenizer
from simplernn_jax.errors import UserError
from simplernn_jax.files import write_file
from simplernn_jax.models import LanguageModel
from simplernn_jax.named_leaves import named_leaves

RECENT_TOKENS = 64
"""Ids kept to decode the next ones with: some tokenizers write a token to suit its neighbours, and
a character may begin in one call and end in the next."""

_FORMAT = "simplernn_jax decoder state"
_VERSION = "1"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecoderState:
    """Where B rows stand: all that is needed to go on. A pytree whose leaves have axis B first."""

    layers: ModelState
    """The model's recurrent state after everything read and written so far."""
    logits: Float[Array, "B vocab"]
    """float32 logits of the next token."""
    position: Int[Array, "B"]
    """Tokens written so far; it numbers the draws of a row."""
    stream: Int[Array, "B"]
    """Which of a seed's random streams a row draws from. Rows that are copies of one another
    write the same text unless their streams differ."""
    finished: Bool[Array, "B"]
    """Rows that wrote EOS. EOS itself is not read, so that such a row can take more text."""
    recent: Int[Array, "B recent"]
    """The last `RECENT_TOKENS` ids read and written, oldest first; -1 before the first."""


def empty_state(model: LanguageModel, num_rows: int) -> DecoderState:
    """The state of `num_rows` rows that have read nothing."""
    return DecoderState(
        layers=model.initial_state(num_rows),
        logits=jnp.zeros((num_rows, model.config.vocab_size), jnp.float32),
        position=jnp.zeros(num_rows, jnp.int32),
        stream=jnp.zeros(num_rows, jnp.int32),
        finished=jnp.zeros(num_rows, jnp.bool_),
        recent=jnp.full((num_rows, RECENT_TOKENS), -1, jnp.int32),
    )


def check_state(model: LanguageModel, state: DecoderState, where: str = "state") -> None:
    """Compares the dtypes and shapes of `state` with those that `model` needs.

    Raises:
      UserError: they differ; begins with `where`.
    """
    needed = jax.eval_shape(lambda: empty_state(model, state.position.size))
    ours, theirs = (
        ", ".join(f"{leaf.dtype}{list(leaf.shape)}" for leaf in jax.tree.leaves(tree))
        for tree in (needed, state)
    )
    if ours != theirs:
        raise UserError(
            f"{where}: its arrays are {theirs} and this model's {ours}; "
            "go on with the model that made it"
        )


def fork_state(state: DecoderState, n: int) -> DecoderState:
    """Copies each row, so that it can go on in `n` ways.

    The first copy of a row keeps its random stream: it writes what the row itself would. The
    others get streams of their own: with a temperature above 0, each copy writes another text.
    A prompt that is read once and forked gives the texts of the same prompt given `n` times.

    Args:
      state: B rows; it stays as it is.
      n: copies of each row, at least 1.

    Returns:
      B * n rows, the copies of a row next to each other.

    Raises:
      UserError: `n` is below 1.
    """
    if n < 1:
        raise UserError(f"n={n}: each row needs at least 1 copy")
    own = np.asarray(state.stream)[:, None]
    # Only rows on one stream may share the new ones: they have read different texts.
    rank = np.unique(own, return_inverse=True)[1].reshape(-1, 1)
    others = own.max() + 1 + rank * (n - 1) + np.arange(n - 1)
    stream = np.concatenate([own, others], axis=1).reshape(-1)
    copies = jax.tree.map(lambda leaf: jnp.repeat(leaf, n, axis=0), state)
    return dataclasses.replace(copies, stream=jnp.asarray(stream, jnp.int32))


def save_state(path: str, state: DecoderState, model: LanguageModel, tokenizer: Tokenizer) -> None:
    """Saves `state` to a file, atomically; one that is there is replaced.

    Args:
      path: of the file, usually ending in ``.safetensors``.
      state: rows of any number.
      model: the one that made the state.
      tokenizer: the one its tokens are of.

    Raises:
      UserError: `path` cannot be written, or the state does not fit the model.
    """
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
      UserError: no such file, not a state, damaged, of another version of the format, of another
        model or of another tokenizer.
    """
    header, arrays = _read(path)
    for name, fingerprint in _fingerprints(model, tokenizer).items():
        if header.get(name) != fingerprint:
            raise UserError(
                f"{path}: the state is of another {name}; use the one that it was saved with, or "
                "read its text again"
            )
    structure = jax.eval_shape(lambda: empty_state(model, 1))
    leaves = [arrays[name] for name in named_leaves(structure)]
    state: DecoderState = jax.tree.unflatten(jax.tree.structure(structure), leaves)
    check_state(model, state, path)
    return jax.tree.map(jnp.array, state)


def _read(path: str) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """Metadata and arrays of the file at `path`, which is whole."""
    advice = "name a file that save_state wrote"
    try:
        with open(path, "rb"):  # says better than safetensors why it cannot
            pass
        with safetensors.safe_open(path, framework="numpy") as file:
            header = file.metadata() or {}
            if header.get("format") != _FORMAT:
                raise UserError(f"{path}: holds no state; {advice}")
            if header.get("version") != _VERSION:
                raise UserError(
                    f"{path}: version {header.get('version')} of the format, and this program "
                    f"knows {_VERSION}; use the program that wrote it, or read its text again"
                )
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); {advice}") from error
    except safetensors.SafetensorError as error:
        raise UserError(f"{path}: damaged, or no state ({error}); {advice}") from error
    content = {name: value for name, value in header.items() if name != "sha256"}
    if header.get("sha256") != _digest(content, arrays):
        raise UserError(f"{path}: damaged; use another copy, or read its text again")
    return header, arrays


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
