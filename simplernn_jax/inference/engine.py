"""The engine of inference: prefill of prompts chunk by chunk, and decoding in one compiled loop.

`generate` runs it on a fixed batch of sequences; the server on slots, whose sequences come and go.
Parameters are arguments, never constants of a program, and a program is compiled once per
architecture, batch size and chunk length. Its weights are another form of the parameters where a C
function computes the model: see `decoder_weights`.
"""

import functools
import itertools
import operator
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from simplernn_jax.array_types import ModelState
from simplernn_jax.errors import UserError
from simplernn_jax.inference.decoder_weights import decoder_weights, decodes_natively, weight_format
from simplernn_jax.inference.sampling import (
    TOP_LOGPROBS,
    Penalties,
    Settings,
    TokenLogprobs,
    next_token,
    token_logprobs,
)
from simplernn_jax.models import LanguageModel
from simplernn_jax.ops.decode import DecoderWeights, decode_tokens
from simplernn_jax.ops.segments import select_sequences

MAX_BLOCK = 128
"""Maximum number of tokens of a sequence that one dispatch decodes."""


class PrefixState(NamedTuple):
    """State of B sequences after their tokens so far."""

    layers: ModelState
    logits: Float[Array, "B vocab"]
    """float32 logits of the next token."""


class Sequences(NamedTuple):
    """Sequences that are decoded together; leaves begin with axis B, except shared settings."""

    state: PrefixState
    stream: Int[Array, "B"]
    """Number of the random stream of a seed: sequences that share a prompt get streams of their
    own."""
    position: Int[Array, "B"]
    """New tokens so far; it numbers the draws of a sequence."""
    remaining: Int[Array, "B"]
    """New tokens still allowed; 0 once a stop id was generated."""
    settings: Settings
    penalties: Penalties | None
    """None leaves them out of the program."""
    wants_logprobs: Bool[Array, "B"] | None
    """None leaves log-probabilities out of the program."""


class Block(NamedTuple):
    """New tokens from one dispatch; the first `counts` of a sequence are valid."""

    tokens: Int[Array, "B block"]
    counts: Int[Array, "B"]
    accepted: Int[Array, "B"]
    """Numbers of drafts among them; see `inference/lookup.py`."""
    logprobs: TokenLogprobs | None
    """Meaningless unless an active sequence wants them."""
    has_ended: Bool[Array, ""]
    """True if no active sequence may have more tokens."""


class Engine:
    """The compiled programs of a model, with its weights; `UserError` for parameters of 16 bits."""

    def __init__(self, model: LanguageModel) -> None:
        self.programs, self.parameters = split_model(model)
        self.is_native = self.programs.is_native
        """True if a C function decodes the model."""
        self.weights: Any = self.parameters
        if self.is_native:
            self.weights = _packed_weights(model, self.programs, self.parameters)

    def chunk_length(self, num_left: int, lengths: Sequence[int]) -> int:
        """Choose the length of the next chunk of a prompt that has `num_left` tokens left, over 0.

        `lengths` begins with the longest, and ends with 1 unless `is_native`: chunks have few
        lengths, so that few programs serve every prompt.
        """
        return lengths[0] if self.is_native else next(n for n in lengths if n <= num_left)

    def prefill(
        self, states: Sequence[PrefixState], prompts: Sequence[np.ndarray], length: int
    ) -> tuple[tuple[tuple[PrefixState, jax.Array], ...], np.ndarray]:
        """Advance states, which have B sequences together, by the next chunk of their prompts.

        Chunks need no padding, so that the state of a sequence depends on its own tokens alone: a
        sequence with fewer tokens keeps its state and waits for a shorter chunk, except if
        `is_native`, where it may have fewer than the others.

        Args:
          states: before the chunk.
          prompts: what is left of the prompts of all B sequences.
          length: of the chunk, T.

        Returns:
          Each state after the chunk, and the inputs of the head at all its tokens, [b, T, D], which
          mean nothing for tokens that were not taken; and [B] the tokens taken of each prompt.
        """
        counts = np.array([min(len(prompt), length) for prompt in prompts], np.int32)
        if not self.is_native:
            counts[counts < length] = 0
        tokens = np.zeros((len(prompts), length), np.int32)
        for row, prompt, count in zip(tokens, prompts, counts, strict=True):
            row[:count] = prompt[:count]
        return self.programs.prefill(self.weights, tuple(states), tokens, counts), counts

    def score(self, hidden: jax.Array, targets: np.ndarray) -> TokenLogprobs:
        """Compute the log-probabilities of `targets` [T] from inputs of the head, [1, T, D]."""
        return self.programs.score(self.parameters, hidden, targets)

    def decode(
        self, sequences: Sequences, is_active: np.ndarray, num_tokens: int
    ) -> tuple[Block, Sequences]:
        """Decode up to `num_tokens` more tokens of the active sequences; donates `sequences`."""
        return self.programs.decode(self.weights, sequences, is_active, np.int32(num_tokens))


@jax.jit
def batch_sequences(
    state: PrefixState, stream: Any, position: Any, remaining: Any, settings: Settings
) -> Sequences:
    """Copy a state, for decoding, into sequences that share `settings`, without their axis B."""
    settings = jax.tree.map(lambda x: x[None], settings)
    sequences = Sequences(
        state, stream, position, remaining, settings, penalties=None, wants_logprobs=None
    )
    return jax.tree.map(jnp.copy, sequences)


@functools.partial(jax.jit, donate_argnums=0)
def insert_sequences(
    sequences: Sequences, index: Int[Array, "P"], states: tuple[PrefixState, ...], others: Sequences
) -> Sequences:
    """Replace P sequences; donates `sequences`.

    Args:
      sequences: B of them.
      index: of the sequences to replace; B replaces none.
      states: of one sequence each.
      others: the rest of all P; its `state` is not used.
    """
    state = jax.tree.map(lambda *parts: jnp.concatenate(parts), *states)
    new = others._replace(state=state)
    return jax.tree.map(lambda all, some: all.at[index].set(some, mode="drop"), sequences, new)


class Programs:
    """The compiled programs of an architecture, which is a model without its arrays."""

    def __init__(self, graphdef: Any, treedef: Any, is_native: bool) -> None:
        self._graphdef, self._treedef = graphdef, treedef
        self.is_native = is_native
        """True if a C function decodes the model."""
        self.pack = jax.jit(self._pack)
        self.prefill = jax.jit(self._prefill)
        self.score = jax.jit(self._score)
        self.decode = jax.jit(self._decode, donate_argnums=1)

    def merge(self, parameters: list[Array]) -> LanguageModel:
        """Make a model with these arrays."""
        return nnx.merge(self._graphdef, jax.tree.unflatten(self._treedef, parameters))

    def _pack(self, parameters: list[Array]) -> DecoderWeights:
        """Make the weights of the C function."""
        model = self.merge(parameters)
        return decoder_weights(model, weight_format(model))

    def _prefill(
        self,
        weights: Any,
        states: tuple[PrefixState, ...],
        tokens: Int[Array, "B T"],
        num_tokens: Int[Array, "B"],
    ) -> tuple[tuple[PrefixState, Float[Array, "b T D"]], ...]:
        state = jax.tree.map(lambda *parts: jnp.concatenate(parts), *states)
        state, hidden = self._advance(weights, tokens, num_tokens, state, copies_caches=True)
        bounds = itertools.accumulate((len(part.logits) for part in states), initial=0)
        return tuple(
            jax.tree.map(lambda x, i=start, j=end: x[i:j], (state, hidden))
            for start, end in itertools.pairwise(bounds)
        )

    def _score(
        self, parameters: list[Array], hidden: Float[Array, "1 T D"], targets: Int[Array, "T"]
    ) -> TokenLogprobs:
        return token_logprobs(self.merge(parameters).logits(hidden)[0], targets)

    def _advance(
        self,
        weights: Any,
        tokens: Int[Array, "B T"],
        num_tokens: Int[Array, "B"],
        state: PrefixState,
        *,
        copies_caches: bool,
    ) -> tuple[PrefixState, Float[Array, "B T D"]]:
        """Compute states after `num_tokens` tokens, and inputs of the head; see `Engine.prefill`.

        `num_tokens` is 0 or T, or any number between where a C function decodes the model. Unless
        `copies_caches`, which takes as long as a token, a KV cache that gets no token loses the
        oldest one, which no later token attends to.
        """
        layers, logits = state
        if self.is_native:
            logits, hidden, layers = decode_tokens(weights, tokens, num_tokens, logits, layers)
            return PrefixState(layers, logits), hidden
        model = self.merge(weights)
        select = functools.partial(select_sequences, num_tokens > 0)
        hidden, new_layers = model.hidden_states(tokens, layers)
        logits = select(model.logits(hidden[:, -1:])[:, 0], logits)
        if copies_caches:
            layers = jax.tree.map(select, new_layers, layers)
        else:
            layers = model.select_states(num_tokens == 0, layers, new_layers)
        return PrefixState(layers, logits), hidden

    def _decode(
        self,
        weights: Any,
        start: Sequences,
        is_active: Bool[Array, "B"],
        num_tokens: Int[Array, ""],
    ) -> tuple[Block, Sequences]:
        settings = start.settings
        with_penalties, with_logprobs, keys = options_of(start, is_active)

        def is_unfinished(carry: tuple[Any, Block, Sequences]) -> Bool[Array, ""]:
            step, _, now = carry
            return (step < num_tokens) & jnp.any(is_active & (now.remaining > 0))

        def decode_one(carry: tuple[Any, Block, Sequences]) -> tuple[Any, Block, Sequences]:
            step, block, now = carry
            logits = now.state.logits
            token = next_token(logits, settings, now.penalties, with_penalties, keys, now.position)
            tokens, is_decoded = token[:, None], is_active & (now.remaining > 0)
            new = is_decoded.astype(jnp.int32)
            is_stop = jnp.take_along_axis(settings.is_stop, tokens, axis=1)[:, 0]
            put = functools.partial(lax.dynamic_update_index_in_dim, index=step, axis=1)
            logprobs = None
            if block.logprobs is not None:
                logprobs = lax.cond(with_logprobs, token_logprobs, no_logprobs, logits, token)
            block = block._replace(
                tokens=put(block.tokens, token),
                counts=block.counts + new,
                logprobs=jax.tree.map(put, block.logprobs, logprobs),
            )
            now = count_tokens(now, with_penalties, tokens, new)
            # A stop id is not part of the state, so that its sequence can be continued.
            is_read = (is_decoded & ~is_stop).astype(jnp.int32)
            state, _ = self._advance(weights, tokens, is_read, now.state, copies_caches=False)
            now = now._replace(
                state=state,
                position=now.position + new,
                remaining=jnp.where(is_decoded & is_stop, 0, now.remaining - new),
            )
            return step + 1, block, now

        block = empty_block(start, MAX_BLOCK)
        _, block, end = lax.while_loop(is_unfinished, decode_one, (jnp.int32(0), block, start))
        return block._replace(has_ended=~jnp.any(is_active & (end.remaining > 0))), end


_programs_for = functools.lru_cache(maxsize=16)(Programs)
"""Cached here, because hashing a graph at every dispatch takes as long as a token."""


def split_model(model: LanguageModel) -> tuple[Programs, list[Array]]:
    """Split a model into programs and its arrays; `UserError` if they have 16 bits."""
    graphdef, arrays = nnx.split(model)
    parameters, treedef = jax.tree.flatten(arrays)
    for x in parameters:
        if jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < 4:
            raise UserError(f"model: has {x.dtype} parameters; convert them to float32")
    return _programs_for(graphdef, treedef, decodes_natively(model)), parameters


_packed: weakref.WeakKeyDictionary[LanguageModel, tuple[list[Array], DecoderWeights]]
_packed = weakref.WeakKeyDictionary()
"""Parameters of each model when its weights were packed, and these weights."""


def _packed_weights(
    model: LanguageModel, programs: Programs, parameters: list[Array]
) -> DecoderWeights:
    """Return the weights of the C function, packed anew if a parameter of the model changed."""
    if model not in _packed or not all(map(operator.is_, _packed[model][0], parameters)):
        _packed[model] = parameters, programs.pack(parameters)
    return _packed[model][1]


def options_of(
    start: Sequences, is_active: Bool[Array, "B"]
) -> tuple[Bool[Array, ""], Bool[Array, ""], Key[Array, "B"]]:
    """Return if an active sequence has penalties, if one wants log-probabilities, and the keys."""
    penalties, with_penalties, with_logprobs = start.penalties, jnp.bool_(False), jnp.bool_(False)
    if penalties is not None:
        is_neutral = (penalties.repetition == 1) & (penalties.presence == 0)
        is_neutral &= penalties.frequency == 0
        with_penalties = jnp.any(is_active & ~is_neutral)
    if start.wants_logprobs is not None:
        with_logprobs = jnp.any(is_active & start.wants_logprobs)
    seeds = jnp.broadcast_to(start.settings.seed, start.stream.shape)
    keys = jax.vmap(lambda seed, stream: jax.random.fold_in(jax.random.key(seed), stream))(
        seeds, start.stream
    )
    return with_penalties, with_logprobs, keys


def empty_block(start: Sequences, length: int) -> Block:
    """Make a block with room for `length` tokens of each sequence."""
    num_sequences, vocab_size = start.state.logits.shape
    logprobs = None
    if start.wants_logprobs is not None:
        shape = num_sequences, length, min(TOP_LOGPROBS, vocab_size)
        logprobs = TokenLogprobs(
            token=jnp.zeros(shape[:2], jnp.float32),
            top=jnp.zeros(shape, jnp.float32),
            top_ids=jnp.zeros(shape, jnp.int32),
        )
    zeros = jnp.zeros(num_sequences, jnp.int32)
    tokens = jnp.zeros((num_sequences, length), jnp.int32)
    return Block(tokens, zeros, zeros, logprobs, jnp.bool_(False))


def no_logprobs(logits: jax.Array, token: jax.Array) -> TokenLogprobs:
    """Make zeros in place of `token_logprobs`."""
    return jax.tree.map(jnp.zeros_like, jax.eval_shape(token_logprobs, logits, token))


def count_tokens(
    now: Sequences, with_penalties: Array, tokens: Int[Array, "B T"], new: Int[Array, "B"]
) -> Sequences:
    """Count the first `new` tokens of each sequence for its penalties."""
    if now.penalties is None:
        return now

    def count(counts: jax.Array) -> jax.Array:
        is_new = jnp.arange(tokens.shape[1])[None] < new[:, None]
        return counts.at[jnp.arange(len(new))[:, None], tokens].add(is_new.astype(jnp.int32))

    counts = lax.cond(with_penalties, count, lambda counts: counts, now.penalties.counts)
    return now._replace(penalties=now.penalties._replace(counts=counts))
