"""Writing with a language model: read the prompts in pieces, then decode with cached state."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from simplernn_jax.devices import check_memory
from simplernn_jax.inference.arguments import check_callback, check_model
from simplernn_jax.inference.inputs import (
    Prompts,
    checked_length,
    checked_prompts,
    checked_settings,
)
from simplernn_jax.inference.programs import BLOCK_TOKENS, Programs, Settings, split
from simplernn_jax.inference.state import (
    RECENT_TOKENS,
    DecoderState,
    check_state,
    empty_state,
    state_bytes,
)
from simplernn_jax.models import LanguageModel

PIECE_LENGTHS = (512, 64, 8, 1)
"""Prompts are read in pieces of these lengths, longest first, so that four programs read every
length without padding: a row's state sees its own tokens and nothing else."""


@dataclasses.dataclass(frozen=True)
class Generation:
    """What `generate` wrote."""

    tokens: np.ndarray
    """[B, max_new_tokens] int32 new tokens, prompts not included, the EOS that ended a row
    included; behind it EOS is repeated."""
    lengths: np.ndarray
    """[B] int32 tokens that count in each row, its EOS included."""
    state: DecoderState
    """Where the rows stand now; give it to `generate` to go on."""

    def rows(self) -> list[np.ndarray]:
        """The tokens that count, one 1-D array per row."""
        return [row[:length] for row, length in zip(self.tokens, self.lengths, strict=True)]


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
    """Continues each prompt by up to `max_new_tokens` tokens.

    A prompt is read in pieces (memory does not grow with its length), then tokens are written
    in blocks of 32 by one compiled loop with cached state: the time per token does not
    grow with the context. Rows are independent: each gets the tokens it would get alone, up to
    the rounding of float32 sums, which XLA may order differently for another batch size.

    Row i draws from random stream n of `seed`, where n counts the earlier rows with the same
    prompt: so a prompt gives the same text alone and in any batch, and a prompt given n times
    gives n texts. Going on from `Generation.state` with the same settings writes exactly what
    one longer call would have written.

    Args:
      model: the language model; its parameters may change between calls without recompiling.
      prompts: B sequences of token ids of any lengths, or a [B, T] integer array; one flat
        sequence is a batch of one. With `state`, what to read before going on: a row may be
        empty, and None reads nothing.
      max_new_tokens: tokens to write per row, in [0, 2**31); 0 only reads.
      temperature: 0 takes the best token; otherwise logits are divided by it before drawing.
      top_k: draw among the k best tokens only; 0 is off.
      top_p: draw among the best tokens that together reach this probability only; 1 is off.
      seed: of the draws, in [0, 2**32).
      eos_id: the token that ends a row; None writes `max_new_tokens` in every row.
      banned_ids: tokens never written, such as BOS and PAD.
      state: rows to continue, from an earlier call with the same model.
      on_tokens: called after each block with the new tokens of every row ([n] int32 each, n
        may be 0), while the next block is being computed.

    Raises:
      UserError: a token outside the vocabulary, an empty prompt without a state, an argument of
        another type or out of its range, a state that does not fit, or states or tokens that
        this machine's memory cannot hold.
    """
    check_model(model)
    vocab_size = model.config.vocab_size
    settings = checked_settings(vocab_size, temperature, top_k, top_p, seed, eos_id, banned_ids)
    check_callback("on_tokens", on_tokens)
    if state is not None:
        check_state(model, state)
    rows = checked_prompts(prompts, vocab_size, None if state is None else len(state.position))
    max_new_tokens = checked_length(max_new_tokens, len(rows))
    programs, parameters = split(model)
    if state is None:
        state = _fresh_state(model, rows)
    state = _read_prompts(programs, parameters, state, rows)

    fill = 0 if eos_id is None else eos_id
    tokens = np.full((len(rows), max_new_tokens), fill, np.int32)
    lengths = np.zeros(len(rows), np.int32)
    blocks = _blocks(programs, parameters, state, settings, max_new_tokens)
    for block, counts, newest_state in blocks:
        state = newest_state
        new = [row[:count] for row, count in zip(block, counts, strict=True)]
        for row, written, start in zip(tokens, new, lengths, strict=True):
            row[start : start + len(written)] = written
        lengths += counts
        if on_tokens is not None:
            on_tokens(new)
    written = Generation(tokens=tokens, lengths=lengths, state=state)
    return dataclasses.replace(written, state=_remember(state, written.rows()))


def _fresh_state(model: LanguageModel, rows: list[np.ndarray]) -> DecoderState:
    seen: Counter[bytes] = Counter()
    streams = []
    for row in rows:
        streams.append(seen[row.tobytes()])
        seen[row.tobytes()] += 1
    of_one = jax.eval_shape(lambda: empty_state(model, 1))
    check_memory(len(rows) * state_bytes(of_one), f"{len(rows)} prompts", "give fewer at a time")
    state = empty_state(model, len(rows))
    return dataclasses.replace(state, stream=jnp.asarray(streams, jnp.int32))


def _remember(state: DecoderState, new: list[np.ndarray]) -> DecoderState:
    recent = [
        np.concatenate([old, row[-RECENT_TOKENS:]])[-RECENT_TOKENS:]
        for old, row in zip(np.asarray(state.recent), new, strict=True)
    ]
    return dataclasses.replace(state, recent=jnp.asarray(np.stack(recent)))


def _read_prompts(
    programs: Programs, parameters: list[jax.Array], state: DecoderState, rows: list[np.ndarray]
) -> DecoderState:
    num_read = np.zeros(len(rows), np.int64)
    num_tokens = np.asarray([len(row) for row in rows])
    for length in PIECE_LENGTHS:
        while (is_reading := num_tokens - num_read >= length).any():
            tokens = np.zeros((len(rows), length), np.int32)
            for index in np.flatnonzero(is_reading):
                tokens[index] = rows[index][num_read[index] : num_read[index] + length]
            state = programs.read(parameters, state, tokens, is_reading)
            num_read += length * is_reading
    return _remember(state, rows)


def _blocks(
    programs: Programs,
    parameters: list[jax.Array],
    state: DecoderState,
    settings: Settings,
    max_new_tokens: int,
) -> Iterator[tuple[np.ndarray, np.ndarray, DecoderState]]:
    """Yields (tokens [B, BLOCK_TOKENS], counts [B], newest state) until all is written.

    One block is always in flight: the device computes it while the caller handles the one
    before. Where all rows have finished it is empty and leaves the state as it is.
    """
    in_flight = None
    for start in range(0, max_new_tokens, BLOCK_TOKENS):
        num_tokens = np.int32(min(BLOCK_TOKENS, max_new_tokens - start))
        block, counts, state = programs.write(parameters, state, settings, num_tokens)
        if in_flight is not None:
            tokens, num_written, all_finished = jax.device_get(in_flight)
            yield tokens, num_written, state
            if all_finished:
                return
        in_flight = block, counts, jnp.all(state.finished)
    if in_flight is not None:
        tokens, num_written, _ = jax.device_get(in_flight)
        yield tokens, num_written, state
