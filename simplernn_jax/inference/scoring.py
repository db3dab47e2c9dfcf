"""How surprising each token of a text is to a model, in one pass and in constant memory.

The text arrives block by block and is one document: the state is carried from its first character
to its last. The bits of a token are its negative log2 probability given everything before it.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from simplernn_jax.data.tokenizer import Tokenizer
from simplernn_jax.errors import UserError
from simplernn_jax.inference.decode import CHUNK_LENGTHS, generate
from simplernn_jax.inference.engine import Architecture, Engine, PrefixState, split_model
from simplernn_jax.inference.state import empty_state
from simplernn_jax.models import LanguageModel

LN2 = math.log(2)
_ROWS = 64
"""Rows of logits that are in memory at a time."""
_EXPECTED_TOKENS = 16
"""Maximum number of tokens of the text that the model expected."""


class TokenBits(NamedTuple):
    """Surprise of n tokens; in bits, float32."""

    bits: Float[Array | np.ndarray, "n"]
    """-log2 p of the token."""
    expected: Float[Array | np.ndarray, "n"]
    """Entropy of the prediction: the bits that the model itself expected."""
    variance: Float[Array | np.ndarray, "n"]
    """Variance of -log2 p under the prediction."""


@dataclasses.dataclass(frozen=True)
class ScoredBlock:
    """Consecutive text with the surprise of its tokens."""

    text: bytes
    """UTF-8."""
    ids: np.ndarray
    """[n] int32 tokens."""
    starts: np.ndarray
    """[n] int64 position in `text` of the first byte of each token."""
    scores: TokenBits
    _chunks: list[tuple[int, PrefixState]]
    """Positions of the first tokens of chunks, and the states before them."""


class Scorer:
    """Scores one document; `UserError` for parameters of 16 bits."""

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._engine = Engine(model)
        architecture, self._parameters = split_model(model)
        self._surprise = _surprise_of(architecture)
        empty = empty_state(model, 1)
        self._state = PrefixState(empty.layers, empty.logits)
        self._lengths = np.full(tokenizer.vocab_size, -1, np.int64)
        """Bytes of the text of each token; -1 if not known yet."""
        self._advance(np.array([tokenizer.bos_id], np.int32))

    def feed(self, text: str) -> ScoredBlock:
        """Score the next text of the document; its memory grows with this text.

        Raises:
          UserError: the tokenizer cannot encode it, or its tokens are not pieces of the text.
        """
        ids, data = self._tokenizer.encode(text), text.encode()
        lengths = self._token_lengths(ids)
        if lengths.sum() != len(data):
            raise UserError(
                "the tokens of this model are not pieces of its text, so that none has bits of its "
                "own; use a model of bytes, characters or a byte-level tokenizer"
            )
        chunks, scores = [], []
        position = 0
        for state, taken, new in self._advance(ids):
            chunks.append((position, state))
            scores.append((taken, new))
            position += taken
        rows = [[x[:n] for x in found] for n, found in jax.device_get(scores)]
        columns = [np.concatenate(part) for part in zip(*rows, strict=True)] or [np.zeros(0)] * 3
        return ScoredBlock(data, ids, np.cumsum(lengths) - lengths, TokenBits(*columns), chunks)

    def expected_text(self, block: ScoredBlock, index: int) -> str:
        """Return what the model would have written from token `index` of a block on.

        The text ends with the first word or line end, and has at most 16 tokens.
        """
        at = np.searchsorted([start for start, _ in block._chunks], index, side="right") - 1
        first, state = block._chunks[at]
        start = dataclasses.replace(
            empty_state(self._model, 1), layers=state.layers, logits=state.logits
        )
        tokenizer = self._tokenizer
        generation = generate(
            self._model,
            [block.ids[first:index]],
            max_new_tokens=_EXPECTED_TOKENS,
            eos_id=tokenizer.eos_id,
            state=start,
        )
        new = [x for x in generation.sequences()[0] if x != tokenizer.eos_id]
        text = tokenizer.decode_bytes(new).decode("utf-8", "ignore")
        word = text.lstrip()
        end = len(text) - len(word) + len(word.split(maxsplit=1)[0]) if word else len(text)
        return text[: max(end, 1)]

    def _advance(self, ids: np.ndarray) -> list[tuple[PrefixState, int, TokenBits]]:
        """Read tokens; return the state before each chunk, its tokens, and their surprise."""
        found = []
        while len(ids):
            length = self._engine.chunk_length(len(ids), CHUNK_LENGTHS)
            before = self._state
            (((self._state, hidden),), counts) = self._engine.prefill([before], [ids], length)
            count = int(counts[0])
            targets = np.zeros(length, np.int32)
            targets[:count] = ids[:count]
            found.append(
                (before, count, self._surprise(self._parameters, before.logits, hidden, targets))
            )
            ids = ids[count:]
        return found

    def _token_lengths(self, ids: np.ndarray) -> np.ndarray:
        unknown = np.unique(ids[self._lengths[ids] < 0])
        self._lengths[unknown] = [len(self._tokenizer.decode_bytes([x])) for x in unknown]
        return self._lengths[ids]


@functools.lru_cache(maxsize=4)
def _surprise_of(architecture: Architecture) -> Callable[..., TokenBits]:
    """Make the program that scores the tokens of a chunk."""

    @jax.jit
    def surprise(
        parameters: list[Array],
        logits: Float[Array, "1 vocab"],
        hidden: Float[Array, "1 T D"],
        targets: Int[Array, "T"],
    ) -> TokenBits:
        model = architecture.merge(parameters)

        def score(row: tuple[jax.Array, ...]) -> TokenBits:
            is_first, inputs, target = row
            new = jnp.where(is_first, logits[0], model.logits(inputs[None, None])[0, 0])
            nats = -jax.nn.log_softmax(new)
            p = jnp.exp(-nats)
            mean = jnp.sum(p * nats)
            return TokenBits(nats[target], mean, jnp.sum(p * jnp.square(nats - mean)))

        # The head at a token predicts the next one; the state before predicts the first.
        is_first = jnp.arange(len(targets)) == 0
        rows = is_first, jnp.roll(hidden[0], 1, axis=0), targets
        bits, expected, variance = lax.map(score, rows, batch_size=_ROWS)
        return TokenBits(bits / LN2, expected / LN2, variance / LN2**2)

    return surprise
