"""Generation with a language model: prefill the prompts in chunks, then decode with a state."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from simplernn_jax.inference.arguments import (
    Prompts,
    check_logits,
    check_model,
    checked_integer,
    checked_prompts,
    checked_sampling,
)
from simplernn_jax.inference.engine import Block, Engine, PrefixState, Sequences, batch_sequences
from simplernn_jax.inference.lookup import History, decode_with_drafts, make_history, use_lookup
from simplernn_jax.inference.state import RECENT_TOKENS, DecoderState, check_state, empty_state
from simplernn_jax.models import LanguageModel
from simplernn_jax.models.memory_estimate import check_generation

BLOCK_TOKENS = 32
"""Maximum number of tokens of a sequence that one dispatch decodes, and `on_tokens` gets."""
CHUNK_LENGTHS: tuple[int, ...] = (512, 64, 8, 1)
"""Lengths of the chunks in which prompts are prefilled."""
NATIVE_TOKENS = 512
"""Tokens of all sequences in a call of the C function, whose activations then stay in the cache of
a core."""


@dataclasses.dataclass(frozen=True)
class Generation:
    """New tokens of B sequences and their decoder state."""

    tokens: np.ndarray
    """[B, max_new_tokens] int32, without the prompts, up to and with EOS, then padded with EOS."""
    lengths: np.ndarray
    """[B] int32 number of new tokens of each sequence, EOS included."""
    state: DecoderState
    """State after the new tokens, from which `generate` continues."""
    accepted: np.ndarray
    """[B] int32 number of new tokens that `lookup` drafted."""

    def sequences(self) -> list[np.ndarray]:
        """List the new tokens of each sequence without padding."""
        return [tokens[:length] for tokens, length in zip(self.tokens, self.lengths, strict=True)]


def generate(
    model: LanguageModel,
    prompts: Prompts | None = None,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    eos_id: int | None = None,
    banned_ids: Sequence[int] = (),
    state: DecoderState | None = None,
    on_tokens: Callable[[list[np.ndarray]], None] | None = None,
    lookup: bool = True,
    contexts: Prompts | None = None,
) -> Generation:
    """Continue each prompt by up to `max_new_tokens` tokens.

    Prefill takes a prompt in chunks (memory does not grow with its length); one compiled loop then
    decodes blocks of 32 tokens, in a time per token that does not grow with the context. Sequences
    are independent: each gets the tokens it would get alone, up to the rounding of float32 sums,
    which XLA may order differently for another batch size (the C function that decodes models of
    parallel and residual blocks on CPUs does not).

    Sequence i draws from random stream n of `seed`, where n counts the earlier sequences with the
    same prompt: a prompt gives the same text alone and in any batch, and a prompt given n times
    gives n texts. Continuing from `Generation.state` with the same settings is bit-exact: it gives
    the tokens of one longer call.

    Args:
      model: the language model; its parameters may change between calls without recompiling.
      prompts: B sequences of token ids of any lengths, or a [B, T] integer array; one flat
        sequence is a batch of one. With `state`, tokens to append first: a sequence may have none,
        and None appends nothing.
      max_new_tokens: new tokens of a sequence at most, in [0, 2**31); 0 only prefills.
      temperature: divides the logits; 0 is greedy.
      top_k: sample among the k most probable tokens; 0 is off.
      top_p: sample among the most probable tokens that together reach this probability; 1 is off.
      seed: of the random streams, in [0, 2**32).
      eos_id: the token that ends a sequence; None always generates `max_new_tokens`.
      banned_ids: tokens that are never generated, such as BOS and PAD.
      state: sequences to continue, from an earlier call with the same model.
      on_tokens: called after each block with the new tokens of every sequence ([n] int32 each, n
        may be 0), while the next block is being computed.
      lookup: decode faster where text repeats, with the same result: what followed the last tokens
        when they came before is drafted, and several tokens are checked at a time. Used where it
        pays: for few sequences and models that a C function decodes.
      contexts: tokens before `state`, of each sequence, in which `lookup` searches too: a state
        knows only the last 64.

    Raises:
      UserError: a token outside the vocabulary, an empty prompt without a state, an argument of
        another type or out of its range, a state that does not fit, states or tokens that this
        machine's memory cannot hold, parameters of 16 bits, or logits that are not finite.
    """
    check_model(model)
    vocab_size = model.config.vocab_size
    sampling = checked_sampling(vocab_size, temperature, top_k, top_p, seed, eos_id, banned_ids)
    if state is not None:
        check_state(model, state)
    num_continued = None if state is None else len(state.position)
    prompts = checked_prompts(prompts, vocab_size, num_continued)
    earlier = checked_prompts(contexts, vocab_size, len(prompts), "context")
    max_new_tokens = checked_integer("max_new_tokens", max_new_tokens, 0, 2**31 - 1)
    check_generation(model, len(prompts), max_new_tokens)
    engine = Engine(model)
    if state is None:
        state = _initial_state(model, prompts)
    recent = [row[row >= 0] for row in np.asarray(state.recent)]
    state = _prefill(engine, state, prompts)
    check_logits(state.logits)

    (fill,) = sampling.stop_ids or (0,)
    tokens = np.full((len(prompts), max_new_tokens), fill, np.int32)
    lengths, accepted = np.zeros((2, len(prompts)), np.int32)
    if not max_new_tokens:
        return Generation(tokens, lengths, state, accepted)
    history = None
    if lookup and use_lookup(engine, len(prompts)):
        texts = [np.concatenate(parts) for parts in zip(earlier, recent, prompts, strict=True)]
        history = make_history(vocab_size, texts, len(texts))
    finished = np.asarray(state.finished) & bool(sampling.stop_ids)
    sequences = batch_sequences(
        PrefixState(state.layers, state.logits),
        state.stream,
        state.position,
        np.where(finished, 0, max_new_tokens).astype(np.int32),
        sampling.arrays(vocab_size),
    )
    for block, newest in _blocks(engine, sequences, history, max_new_tokens):
        sequences = newest
        new = [
            row[:count] for row, count in zip(np.asarray(block.tokens), block.counts, strict=True)
        ]
        for index, added in enumerate(new):
            tokens[index, lengths[index] :][: len(added)] = added
            finished[index] |= len(added) > 0 and added[-1] in sampling.stop_ids
        lengths += block.counts
        accepted += block.accepted
        if on_tokens is not None:
            on_tokens(new)
    layers, logits = sequences.state
    check_logits(logits)  # not at every block, which would wait for the next one
    state = dataclasses.replace(
        state,
        layers=layers,
        logits=logits,
        position=sequences.position,
        finished=jnp.asarray(finished),
    )
    new = [row[:length] for row, length in zip(tokens, lengths, strict=True)]
    return Generation(tokens, lengths, _with_recent(state, new), accepted)


def _initial_state(model: LanguageModel, prompts: list[np.ndarray]) -> DecoderState:
    seen: Counter[bytes] = Counter()
    streams = []
    for prompt in prompts:
        streams.append(seen[prompt.tobytes()])
        seen[prompt.tobytes()] += 1
    state = empty_state(model, len(prompts))
    return dataclasses.replace(state, stream=jnp.asarray(streams, jnp.int32))


def _with_recent(state: DecoderState, new: list[np.ndarray]) -> DecoderState:
    recent = [
        np.concatenate([old, tokens[-RECENT_TOKENS:]])[-RECENT_TOKENS:]
        for old, tokens in zip(np.asarray(state.recent), new, strict=True)
    ]
    return dataclasses.replace(state, recent=jnp.asarray(np.stack(recent)))


def _prefill(engine: Engine, state: DecoderState, prompts: list[np.ndarray]) -> DecoderState:
    now, lengths = PrefixState(state.layers, state.logits), CHUNK_LENGTHS
    if engine.is_native:
        lengths = (max(1, NATIVE_TOKENS // len(prompts)),)
    left = prompts
    while num_left := max(map(len, left), default=0):
        ((now, _),), counts = engine.prefill([now], left, engine.chunk_length(num_left, lengths))
        left = [prompt[count:] for prompt, count in zip(left, counts, strict=True)]
    is_empty = np.array([len(prompt) == 0 for prompt in prompts])
    finished = jnp.asarray(np.asarray(state.finished) & is_empty)
    state = dataclasses.replace(state, layers=now.layers, logits=now.logits, finished=finished)
    return _with_recent(state, prompts)


def _blocks(
    engine: Engine, sequences: Sequences, history: History | None, max_new_tokens: int
) -> Iterator[tuple[Block, Sequences]]:
    """Yield all blocks, as NumPy arrays, each with the newest sequences.

    One block is always in flight: the device computes it while the caller handles the previous
    one. Once all sequences have finished, it is empty and leaves their state unchanged.
    """
    everyone = np.ones(len(sequences.position), np.bool_)
    in_flight = None
    for _ in range(0, max_new_tokens, BLOCK_TOKENS):
        if history is None:
            block, sequences = engine.decode(sequences, everyone, BLOCK_TOKENS)
        else:
            block, sequences, history = decode_with_drafts(
                engine, sequences, history, range(len(everyone)), BLOCK_TOKENS
            )
        if in_flight is not None:
            ready: Block = jax.device_get(in_flight)
            yield ready, sequences
            if ready.has_ended:
                return
        in_flight = block
    yield jax.device_get(in_flight), sequences
