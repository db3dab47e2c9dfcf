"""How surprising each token of a text is to a model, in one pass and in constant memory.

The text arrives block by block and is one document: the state is carried from its first character
to its last. The bits of a token are its negative log2 probability given everything before it.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from simplernn_jax.data.tokenizer import Tokenizer
from simplernn_jax.errors import UserError
from simplernn_jax.inference.arguments import check_logits
from simplernn_jax.inference.decode import CHUNK_LENGTHS, generate
from simplernn_jax.inference.engine import Architecture, Engine, PrefixState, split_model
from simplernn_jax.inference.state import empty_state
from simplernn_jax.models import LanguageModel

_ROWS = 64
"""Rows of logits that are in memory at a time."""
_EXPECTED_TOKENS = 40
"""Maximum number of tokens of the text that the model expected."""


class Place(NamedTuple):
    """A place in a text: tokens, fewer than a chunk, after a state."""

    state: PrefixState
    ids: np.ndarray


@dataclasses.dataclass(frozen=True)
class ScoredBlock:
    """Consecutive text and its n tokens."""

    text: bytes  # UTF-8
    ids: np.ndarray  # [n] int32
    starts: np.ndarray  # [n] int64 position in `text` of the first byte of each token
    bits: np.ndarray  # [n] float32
    entropy: np.ndarray  # [n] float32 bits that the model expected
    _chunks: list[tuple[int, PrefixState]]  # first tokens of chunks, and the states before them

    @property
    def excess(self) -> np.ndarray:
        """[n] float32 bits beyond the expected ones, at least 0."""
        return np.maximum(self.bits - self.entropy, 0)

    def before(self, index: int) -> Place:
        """Return the place before token `index`."""
        first, state = next(chunk for chunk in reversed(self._chunks) if chunk[0] <= index)
        return Place(state, self.ids[first:index])


class Scorer:
    """Scores one document; `UserError` for parameters of 16 bits."""

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._engine = Engine(model)
        architecture, self._parameters = split_model(model)
        self._score = _program(architecture)
        empty = empty_state(model, 1)
        self._state = PrefixState(empty.layers, empty.logits)
        self._lengths = np.full(tokenizer.vocab_size, -1)  # in bytes, of known tokens
        self._advance(np.array([tokenizer.bos_id], np.int32))

    def feed(self, text: str) -> ScoredBlock:
        """Score the next text of the document; memory grows with this text only.

        Raises:
          UserError: the tokenizer cannot encode it, its tokens are not pieces of the text, or the
            model's logits are not finite.
        """
        ids, data = self._tokenizer.encode(text), text.encode()
        unknown = np.unique(ids[self._lengths[ids] < 0])
        self._lengths[unknown] = [len(self._tokenizer.decode_bytes([x])) for x in unknown]
        lengths = self._lengths[ids]
        if lengths.sum() != len(data):
            raise UserError(
                "the tokens of this model are not pieces of its text, so that none has bits of its "
                "own; use a model of bytes, characters or a byte-level tokenizer"
            )
        chunks, scores = self._advance(ids)
        check_logits(self._state.logits)
        bits, entropy = np.concatenate([np.zeros((2, 0), np.float32), *scores], axis=1)
        return ScoredBlock(data, ids, np.cumsum(lengths) - lengths, bits, entropy, chunks)

    def _advance(
        self, ids: np.ndarray
    ) -> tuple[list[tuple[int, PrefixState]], list[Float[np.ndarray, "2 n"]]]:
        """Read tokens; return their chunks, and the bits and entropy of each chunk's tokens."""
        chunks, scores, position = [], [], 0
        while position < len(ids):
            left, before = ids[position:], self._state
            length = self._engine.chunk_length(len(left), CHUNK_LENGTHS)
            (((self._state, hidden),), (count,)) = self._engine.prefill([before], [left], length)
            targets = np.resize(left[:count], length)
            scores.append(self._score(self._parameters, before.logits, hidden, targets))
            chunks.append((position, before))
            position += int(count)
        found = zip(jax.device_get(scores), chunks, strict=True)
        # Only the last chunk may have fewer tokens than its length.
        return chunks, [each[:, : len(ids) - first] for each, (first, _) in found]


def expected_text(model: LanguageModel, tokenizer: Tokenizer, place: Place) -> str:
    """Generate greedily from a place in a scored text to the end of a word or line.

    The text has at most 40 tokens.
    """
    generation = generate(
        model,
        [place.ids],
        max_new_tokens=_EXPECTED_TOKENS,
        eos_id=tokenizer.eos_id,
        state=dataclasses.replace(empty_state(model, 1), **place.state._asdict()),
    )
    text = tokenizer.decode_bytes(generation.sequences()[0]).decode("utf-8", "ignore")
    found = re.match(r"\s*\S+|\s*", text)
    return found[0] if found else ""


@functools.lru_cache(maxsize=4)
def _program(architecture: Architecture) -> Callable[..., Float[Array, "2 T"]]:
    """Make the program that computes the bits and the entropy of the tokens of a chunk."""

    @jax.jit
    def score(
        parameters: list[Array],
        logits: Float[Array, "1 vocab"],
        hidden: Float[Array, "1 T D"],
        targets: Int[Array, "T"],
    ) -> Float[Array, "2 T"]:
        model = architecture.merge(parameters)

        def score_one(row: tuple[jax.Array, ...]) -> Float[Array, "2"]:
            is_first, inputs, target = row
            new = jnp.where(is_first, logits[0], model.logits(inputs[None, None])[0, 0])
            nats = -jax.nn.log_softmax(new)
            return jnp.stack([nats[target], jnp.sum(jnp.exp(-nats) * nats)]) / math.log(2)

        # The head at a token predicts the next one; the logits before the chunk predict its first.
        rows = jnp.arange(len(targets)) == 0, jnp.roll(hidden[0], 1, axis=0), targets
        return lax.map(score_one, rows, batch_size=_ROWS).T

    return score
