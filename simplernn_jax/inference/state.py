"""Decoder state as a value: keep it, fork it, or save it with `state_file`."""

import dataclasses
import functools
import weakref
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
"""Ids kept as context for the text of the next ones: with some tokenizers the text of a token
depends on its neighbors, and a character may begin in one call and end in the next."""

_MAX_STREAMS = 2**31
"""Random streams have int32 numbers."""


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


def state_shapes(model: LanguageModel, batch_size: int) -> DecoderState:
    """Return the shapes and dtypes of `empty_state`, traced once for each model and batch size."""
    return _shapes(weakref.ref(model), batch_size, jnp.result_type(float))


@functools.lru_cache(maxsize=8)
def _shapes(model: weakref.ref[LanguageModel], batch_size: int, floats: Any) -> DecoderState:
    live = model()
    assert live is not None
    return jax.eval_shape(lambda: empty_state(live, batch_size))


def state_bytes(state: DecoderState) -> int:
    """Count the bytes of all arrays or shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def check_state(model: LanguageModel, state: DecoderState, where: str = "state") -> None:
    """Check `state` against the arrays of `model`; raises `UserError`, beginning with `where`."""
    _check_is_state(state, where)
    needed = state_shapes(model, np.size(state.position))
    ours, theirs = (", ".join(map(_described, jax.tree.leaves(tree))) for tree in (needed, state))
    structure: Any = jax.tree.structure(needed)
    if ours != theirs or structure != jax.tree.structure(state):
        raise UserError(
            f"{where}: its arrays are {theirs} and this model's {ours}; use the model that made it"
        )


def _check_is_state(state: Any, where: str) -> None:
    if not isinstance(state, DecoderState):
        raise UserError(
            f"{where}: {type(state).__name__}; pass the state that generate or load_state returned"
        )


def _described(leaf: Any) -> str:
    return f"{getattr(leaf, 'dtype', type(leaf).__name__)}{list(np.shape(leaf))}"


@functools.partial(jax.jit, static_argnames="n")
def _repeat(state: DecoderState, n: int) -> DecoderState:
    return jax.tree.map(lambda leaf: jnp.repeat(leaf, n, axis=0), state)


def fork_state(state: DecoderState, n: int) -> DecoderState:
    """Copy each sequence, so that it can continue in `n` ways.

    The first copy of a sequence keeps its random stream: it gives the text of the sequence itself.
    The others get streams of their own: with a temperature above 0, each copy gives another text.
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
    n = checked_integer("n", n, 1, _MAX_STREAMS - 1)
    check_memory(n * state_bytes(state), f"n={n}", "make fewer copies")
    own = np.asarray(state.stream, np.int64)[:, None]
    # Only sequences on one stream may share the new ones: their prompts differ.
    rank = np.unique(own, return_inverse=True)[1].reshape(-1, 1)
    others = np.max(own) + 1 + rank * (n - 1) + np.arange(n - 1)
    stream = np.concatenate([own, others], axis=1).reshape(-1)
    if np.max(stream, initial=0) >= _MAX_STREAMS:
        raise UserError(f"n={n}: the random streams of the state are used up; make fewer copies")
    copies = _repeat(state, n)
    return dataclasses.replace(copies, stream=jnp.asarray(stream, jnp.int32))
