"""Generation with a language model: prefill the prompts in chunks, then decode with a state."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from simplernn_jax.devices import check_memory
from simplernn_jax.inference.arguments import (
    Prompts,
    check_callback,
    check_logits,
    check_model,
    checked_length,
    checked_prompts,
    checked_settings,
)
from simplernn_jax.inference.programs import (
    BLOCK_TOKENS,
    Programs,
    programs_for,
    split_model,
    weights_for,
)
from simplernn_jax.inference.sampling import Settings
from simplernn_jax.inference.state import (
    RECENT_TOKENS,
    DecoderState,
    check_state,
    empty_state,
    state_bytes,
    state_shapes,
)
from simplernn_jax.models import LanguageModel

CHUNK_LENGTHS = (512, 64, 8, 1)
"""Prompts are prefilled in chunks of these lengths, longest first, so that four programs serve
every length without padding: the state of a sequence depends on its own tokens alone."""
NATIVE_TOKENS = 512
"""Tokens of all sequences in a call of the C function, whose activations then stay in the cache of
a core; there, one program serves every length."""


@dataclasses.dataclass(frozen=True)
class Generation:
    """New tokens of B sequences and their decoder state."""

    tokens: np.ndarray
    """[B, max_new_tokens] int32, without the prompts, up to and with EOS, then padded with EOS."""
    lengths: np.ndarray
    """[B] int32 number of new tokens of each sequence, EOS included."""
    state: DecoderState
    """State after the new tokens, from which `generate` continues."""

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
) -> Generation:
    """Continue each prompt by up to `max_new_tokens` tokens.

    Prefill takes a prompt in chunks (memory does not grow with its length); one compiled loop then
    decodes blocks of 32 tokens, in a time per token that does not grow with the context. Sequences
    are independent: each gets the tokens it would get alone, up to the rounding of float32 sums,
    which XLA may order differently for another batch size (the C function that decodes models of
    residual blocks on CPUs does not).

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

    Raises:
      UserError: a token outside the vocabulary, an empty prompt without a state, an argument of
        another type or out of its range, a state that does not fit, states or tokens that this
        machine's memory cannot hold, parameters of 16 bits, or logits that are not finite.
    """
    check_model(model)
    vocab_size = model.config.vocab_size
    settings = checked_settings(vocab_size, temperature, top_k, top_p, seed, eos_id, banned_ids)
    check_callback("on_tokens", on_tokens)
    if state is not None:
        check_state(model, state)
    prompts = checked_prompts(prompts, vocab_size, None if state is None else len(state.position))
    max_new_tokens = checked_length(max_new_tokens, len(prompts))
    architecture, parameters = split_model(model)
    programs = programs_for(architecture)
    chunk_lengths: tuple[int, ...] = CHUNK_LENGTHS
    if architecture.decodes_natively:
        chunk_lengths = (max(1, NATIVE_TOKENS // len(prompts)),)
    if state is None:
        state = _initial_state(model, prompts)
    weights = weights_for(architecture, parameters)
    state = _prefill(programs, weights, state, prompts, chunk_lengths)
    check_logits(state.logits)

    fill = 0 if eos_id is None else eos_id
    tokens = np.full((len(prompts), max_new_tokens), fill, np.int32)
    lengths = np.zeros(len(prompts), np.int32)
    blocks = _blocks(programs, weights, state, settings, max_new_tokens)
    for block, counts, newest_state in blocks:
        state = newest_state
        new = [sequence[:count] for sequence, count in zip(block, counts, strict=True)]
        for sequence, start, added in zip(tokens, lengths, new, strict=True):
            sequence[start : start + len(added)] = added
        lengths += counts
        if on_tokens is not None:
            on_tokens(new)
    check_logits(state.logits)  # not at every block, which would wait for the next one
    generation = Generation(tokens=tokens, lengths=lengths, state=state)
    return dataclasses.replace(generation, state=_remember(state, generation.sequences()))


def _initial_state(model: LanguageModel, prompts: list[np.ndarray]) -> DecoderState:
    seen: Counter[bytes] = Counter()
    streams = []
    for prompt in prompts:
        streams.append(seen[prompt.tobytes()])
        seen[prompt.tobytes()] += 1
    num_bytes = len(prompts) * state_bytes(state_shapes(model, 1))
    check_memory(num_bytes, f"{len(prompts)} prompts", "pass fewer at a time")
    state = empty_state(model, len(prompts))
    return dataclasses.replace(state, stream=jnp.asarray(streams, jnp.int32))


def _remember(state: DecoderState, new: list[np.ndarray]) -> DecoderState:
    recent = [
        np.concatenate([old, tokens[-RECENT_TOKENS:]])[-RECENT_TOKENS:]
        for old, tokens in zip(np.asarray(state.recent), new, strict=True)
    ]
    return dataclasses.replace(state, recent=jnp.asarray(np.stack(recent)))


def _prefill(
    programs: Programs,
    weights: Any,
    state: DecoderState,
    prompts: list[np.ndarray],
    lengths: tuple[int, ...],
) -> DecoderState:
    """Prefill in chunks of these `lengths`; if there is but one, the last chunk may be shorter."""
    done = np.zeros(len(prompts), np.int32)
    size = np.asarray([len(prompt) for prompt in prompts], np.int32)
    for length in lengths:
        shortest = length if len(lengths) > 1 else 1
        while (size - done >= shortest).any():
            count = np.where(size - done >= shortest, np.minimum(size - done, length), 0)
            tokens = np.zeros((len(prompts), length), np.int32)
            for index in np.flatnonzero(count):
                tokens[index, : count[index]] = prompts[index][done[index] :][: count[index]]
            state = programs.prefill(weights, state, tokens, count)
            done += count
    return _remember(state, prompts)


def _blocks(
    programs: Programs, weights: Any, state: DecoderState, settings: Settings, max_new_tokens: int
) -> Iterator[tuple[np.ndarray, np.ndarray, DecoderState]]:
    """Yield (tokens [B, BLOCK_TOKENS], counts [B], newest state) of all blocks.

    One block is always in flight: the device computes it while the caller handles the previous
    one. Once all sequences have finished, it is empty and leaves the state unchanged.
    """
    in_flight = None
    for start in range(0, max_new_tokens, BLOCK_TOKENS):
        num_tokens = np.int32(min(BLOCK_TOKENS, max_new_tokens - start))
        block, counts, state = programs.decode(weights, state, settings, num_tokens)
        if in_flight is not None:
            *ready, all_finished = jax.device_get(in_flight)
            yield *ready, state
            if all_finished:
                return
        in_flight = block, counts, jnp.all(state.finished)
    if in_flight is not None:
        tokens, counts, _ = jax.device_get(in_flight)
        yield tokens, counts, state
