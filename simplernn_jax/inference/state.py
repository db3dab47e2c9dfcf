"""Decoder state as a value: fork it, or save it in a safetensors file.

Nothing in a file is executed. Its metadata hold fingerprints of model and tokenizer and a SHA-256
of everything else, so that neither a stale nor a corrupt state is ever used.
"""

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from simplernn_jax.array_types import ModelState
from simplernn_jax.data.tokenizer import Tokenizer
from simplernn_jax.devices import check_memory, host_memory
from simplernn_jax.errors import UserError
from simplernn_jax.files import read_file, sha256_hex, write_file
from simplernn_jax.inference.arguments import check_model, checked_integer
from simplernn_jax.models import LanguageModel
from simplernn_jax.models.pytorch_weights import decode_safetensors, digest_of
from simplernn_jax.parallel.named_leaves import named_leaves

RECENT_TOKENS = 64
"""Ids kept as context for the text of the next ones: with some tokenizers the text of a token
depends on its neighbors, and a character may begin in one call and end in the next."""

_FORMATS = {"state": "simplernn_jax decoder state", "low-rank update": "simplernn_jax adapter"}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecoderState:
    """State of B sequences, sufficient to continue them: a pytree of leaves with axis B first."""

    layers: ModelState
    """Recurrent state of the model after all tokens so far."""
    logits: Float[Array, "B vocab"]
    """float32 logits of the next token."""
    position: Int[Array, "B"]
    """New tokens so far; it numbers the draws of a sequence."""
    stream: Int[Array, "B"]
    """Number of the random stream of a seed. Copies of a sequence give the same text unless their
    streams differ."""
    finished: Bool[Array, "B"]
    """Sequences that ended with EOS. EOS itself is not in the state, so that they can continue."""
    recent: Int[Array, "B recent"]
    """The last `RECENT_TOKENS` ids of prompt and text, oldest first; -1 before the first."""


def empty_state(model: LanguageModel, batch_size: int) -> DecoderState:
    """Create the state of sequences without tokens."""
    return DecoderState(
        layers=model.initial_state(batch_size),
        logits=jnp.zeros((batch_size, model.config.vocab_size), jnp.float32),
        position=jnp.zeros(batch_size, jnp.int32),
        stream=jnp.zeros(batch_size, jnp.int32),
        finished=jnp.zeros(batch_size, jnp.bool_),
        recent=jnp.full((batch_size, RECENT_TOKENS), -1, jnp.int32),
    )


def check_state(model: LanguageModel, state: DecoderState, where: str = "state") -> None:
    """Check `state` against the arrays of `model`; raises `UserError`, beginning with `where`."""
    _check_is_state(state, where)
    leaves = named_leaves(state)
    ours, theirs = (
        {name: (np.shape(leaf)[1:], leaf.dtype) for name, leaf in each.items()}
        for each in (named_leaves(empty_state(model, 1)), leaves)
    )
    if ours != theirs or len({np.shape(leaf)[:1] for leaf in leaves.values()}) > 1:
        raise UserError(f"{where}: its arrays do not fit this model; use the model that made it")
    if np.max(state.recent, initial=-1) >= model.config.vocab_size:
        raise UserError(f"{where}: has ids outside the vocabulary; use another state")


def _check_is_state(state: Any, where: str) -> None:
    if not isinstance(state, DecoderState):
        raise UserError(
            f"{where}: {type(state).__name__}; pass the state that generate or load_state returned"
        )


def fork_state(state: DecoderState, n: int) -> DecoderState:
    """Copy each sequence, so that it can continue in `n` ways.

    The first copy of a sequence keeps its random stream: it gives the text of the sequence itself.
    The others get their own streams: with a temperature above 0, each copy gives another text.
    A prompt that is prefilled once and forked gives the texts of the same prompt given `n` times.

    Args:
      state: B sequences; not modified.
      n: copies of each sequence, at least 1.

    Returns:
      B * n sequences, the copies of each next to each other.

    Raises:
      UserError: `n` is not an integer or below 1, or the copies do not fit into memory.
    """
    _check_is_state(state, "state")
    n = checked_integer("n", n, 1, 2**31 - 1)
    num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    check_memory(n * num_bytes, f"n={n}", "make fewer copies")
    own = np.asarray(state.stream, np.int64)[:, None]
    # Only sequences on one stream may share the new ones: their prompts differ.
    rank = np.unique(own, return_inverse=True)[1].reshape(-1, 1)
    others = np.max(own) + 1 + rank * (n - 1) + np.arange(n - 1)
    stream = np.concatenate([own, others], axis=1).reshape(-1)
    copies = jax.tree.map(lambda leaf: jnp.repeat(leaf, n, axis=0), state)
    return dataclasses.replace(copies, stream=jnp.asarray(stream, jnp.int32))


def save_state(path: str, state: DecoderState, model: LanguageModel, tokenizer: Tokenizer) -> None:
    """Save `state` to a file, atomically; an existing regular file is replaced.

    `model` created the state, and `tokenizer` its tokens.

    Raises:
      UserError: the state does not fit the model.
      OSError: `path` cannot be written or is something else than a regular file.
    """
    check_model(model)
    check_state(model, state)
    write_file(path, encode_state(state, fingerprints(model, tokenizer)))


def load_state(path: str, model: LanguageModel, tokenizer: Tokenizer) -> DecoderState:
    """Load a state that `save_state` saved, bit-exactly.

    `model` has the parameters and configuration of the one that created the state, and `tokenizer`
    equals the one that it was saved with.

    Raises:
      UserError: no regular file, not a state, corrupt, larger than half of the memory, of another
        version of the format, of another model or of another tokenizer.
    """
    check_model(model)
    content = read_arrays(path, "state")
    state, _ = decode_state(path, content, model, fingerprints(model, tokenizer))
    return jax.tree.map(jnp.array, state)


def encode_state(state: DecoderState, fingerprints: Mapping[str, str], **notes: str) -> bytes:
    """Make the content of a state file; `notes` are more entries of its signed metadata."""
    return encode_arrays(state, "state", {**notes, **fingerprints})


def decode_state(
    where: str, content: bytes, model: LanguageModel, fingerprints: Mapping[str, str]
) -> tuple[DecoderState, dict[str, str]]:
    """Decode a state file to arrays and metadata; `UserError` begins with `where`."""
    arrays, header = decode_arrays(where, content, "state", fingerprints)
    structure = empty_state(model, 1)
    names = named_leaves(structure)
    if arrays.keys() != names.keys():
        raise UserError(
            f"{where}: holds other arrays than a state; specify a file of a saved state"
        )
    leaves = [arrays[name] for name in names]
    state: DecoderState = jax.tree.unflatten(jax.tree.structure(structure), leaves)
    check_state(model, state, where)
    return state, header


def encode_arrays(tree: Any, kind: str, header: Mapping[str, str]) -> bytes:
    """Make the content of a file of one of the `_FORMATS`, whose metadata include a digest."""
    arrays = {name: np.ascontiguousarray(leaf) for name, leaf in named_leaves(tree).items()}
    header = {"format": _FORMATS[kind], "version": "1", **header}
    return safetensors.numpy.save(arrays, {**header, "sha256": digest_of(header, arrays)})


def read_arrays(path: str, kind: str) -> bytes:
    """Read a file of `encode_arrays`; `UserError` if it cannot be read."""
    try:
        return read_file(path, (host_memory() or sys.maxsize) // 2)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", error)
        raise UserError(f"{path}: cannot be read ({reason}); {_advice(kind)}") from error


def decode_arrays(
    where: str, content: bytes, kind: str, fingerprints: Mapping[str, str]
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Decode what `encode_arrays` made to arrays by name and metadata, which it verifies."""
    try:
        arrays, header = decode_safetensors(content)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{where}: corrupted, or not a {kind} ({error}); {_advice(kind)}"
        ) from error
    if not {"format": _FORMATS[kind], "version": "1"}.items() <= header.items():
        raise UserError(f"{where}: no {kind} in version 1 of the format; {_advice(kind)}")
    signed = {name: value for name, value in header.items() if name != "sha256"}
    if header.get("sha256") != digest_of(signed, arrays):
        raise UserError(f"{where}: corrupted; use another copy, or make the {kind} again")
    for name, fingerprint in fingerprints.items():
        if header.get(name) != fingerprint:
            raise UserError(
                f"{where}: the {kind} is of another {name}; use the one that it was saved with (of "
                f"another checkpoint of the run: --checkpoint=STEP), or make the {kind} again"
            )
    return arrays, header


def _advice(kind: str) -> str:
    return f"specify a file of a saved {kind}"


def fingerprints(model: LanguageModel, tokenizer: Tokenizer) -> dict[str, str]:
    """Digests of the parameters and the tokenizer that a state belongs to."""
    return {"model": model_fingerprint(model), "tokenizer": sha256_hex(tokenizer.to_json())}


def model_fingerprint(model: LanguageModel) -> str:
    """Digest of the parameters and the configuration of a model."""
    parameters = named_leaves(nnx.state(model, nnx.Param))
    return digest_of(dataclasses.asdict(model.config), parameters)
