"""The state of a decoder as a value: keep it, fork it, or save it with `state_file`."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from simplernn_jax.array_types import ModelState
from simplernn_jax.devices import check_memory
from simplernn_jax.errors import UserError
from simplernn_jax.inference.arguments import checked_integer
from simplernn_jax.models import LanguageModel

RECENT_TOKENS = 64
"""Ids kept to decode the next ones with: some tokenizers write a token to suit its neighbours, and
a character may begin in one call and end in the next."""

_MOST_STREAMS = 2**31
"""Random streams have int32 numbers."""


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


def state_bytes(state: DecoderState) -> int:
    """Bytes of all arrays, or of what `jax.eval_shape` says of them."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def check_state(model: LanguageModel, state: DecoderState, where: str = "state") -> None:
    """Compares the structure, dtypes and shapes of `state` with those that `model` needs.

    Raises:
      UserError: they differ, or it is no state; begins with `where`.
    """
    _check_is_state(state, where)
    needed = jax.eval_shape(lambda: empty_state(model, np.size(state.position)))
    ours, theirs = (", ".join(map(_described, jax.tree.leaves(tree))) for tree in (needed, state))
    structure: Any = jax.tree.structure(needed)
    if ours != theirs or structure != jax.tree.structure(state):
        raise UserError(
            f"{where}: its arrays are {theirs} and this model's {ours}; "
            "go on with the model that made it"
        )


def _check_is_state(state: Any, where: str) -> None:
    if not isinstance(state, DecoderState):
        raise UserError(
            f"{where}: {type(state).__name__}; give the state that generate or load_state returned"
        )


def _described(leaf: Any) -> str:
    return f"{getattr(leaf, 'dtype', type(leaf).__name__)}{list(np.shape(leaf))}"


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
      UserError: `n` is no integer or below 1, or so many copies do not fit into memory.
    """
    _check_is_state(state, "state")
    n = checked_integer("n", n, 1, _MOST_STREAMS - 1)
    check_memory(n * state_bytes(state), f"n={n}", "make fewer copies")
    own = np.asarray(state.stream, np.int64)[:, None]
    # Only rows on one stream may share the new ones: they have read different texts.
    rank = np.unique(own, return_inverse=True)[1].reshape(-1, 1)
    others = np.max(own) + 1 + rank * (n - 1) + np.arange(n - 1)
    stream = np.concatenate([own, others], axis=1).reshape(-1)
    if np.max(stream, initial=0) >= _MOST_STREAMS:
        raise UserError(f"n={n}: the random streams of the state are used up; make fewer copies")
    copies = jax.tree.map(lambda leaf: jnp.repeat(leaf, n, axis=0), state)
    return dataclasses.replace(copies, stream=jnp.asarray(stream, jnp.int32))
