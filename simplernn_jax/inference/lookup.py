"""Exact speculative decoding: drafts looked up in the text so far, checked several at a time.

A token depends on the logits before it and on its position alone. So the C function computes the
next token and a draft of those after it in one call; what follows each of them is drawn, and the
draft is accepted up to the first token that differs from the one drawn. Tokens, log-probabilities
and states have the bits of `Engine.decode`, whatever the drafts are.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int

from simplernn_jax.inference.engine import (
    MAX_BLOCK,
    Block,
    Engine,
    PrefixState,
    Sequences,
    count_tokens,
    empty_block,
    no_logprobs,
    options_of,
)
from simplernn_jax.inference.sampling import next_token, token_logprobs
from simplernn_jax.ops.decode import DecoderWeights, decode_tokens

MAX_SEQUENCES = 2
"""Maximum number of sequences decoded with drafts; more keep all cores busy anyway."""
RECENT = 1 << 14
"""Tokens of a sequence in which drafts are looked up; also the size of its table."""
WINDOW = 12
"""Tokens of a sequence that one call of the C function computes, at most."""
BYTE_VOCAB, BYTE_ORDER, ORDER = 512, 5, 3
"""Tokens that must match before a draft, of a vocabulary of bytes and of others."""


class History(NamedTuple):
    """Where the drafts of b sequences are looked up."""

    text: Int[Array, "b RECENT"]
    """The last tokens, after -1 in place of missing ones."""
    table: Int[Array, "b RECENT"]
    """Place in `text` of the last token of the newest n-gram with a hash."""


def use_lookup(engine: Engine, num_sequences: int) -> bool:
    """Return whether drafts make decoding of so many sequences faster."""
    return engine.is_native and 0 < num_sequences <= MAX_SEQUENCES


def make_history(vocab_size: int, texts: Sequence[np.ndarray], size: int) -> History:
    """Make the history of sequences with these tokens, and of empty ones up to `size`."""
    order = _order(vocab_size)
    arrays: Any = np.full((size, RECENT), -1, np.int32), np.zeros((size, RECENT), np.int32)
    for text, table, tokens in zip(*arrays, texts, strict=False):
        start = RECENT - len(tokens[-RECENT:])
        text[start:] = tokens[-RECENT:]
        hashes = _hashes(text[max(0, start - order + 1) :], order)
        table[hashes] = np.arange(RECENT - len(hashes), RECENT)  # the newest is the last
    return History(*arrays)


def decode_with_drafts(
    engine: Engine, sequences: Sequences, history: History, index: Sequence[int], num_tokens: int
) -> tuple[Block, Sequences, History]:
    """Decode up to `num_tokens` tokens of some sequences, as `Engine.decode`.

    Args:
      engine: of a model for which `use_lookup` is true.
      sequences: B of them; donated.
      history: of those decoded, and of the idle rest of b sequences.
      index: which sequences are decoded, at most b.
      num_tokens: at most `MAX_BLOCK`.

    Returns:
      The block of the b sequences; all B sequences; and the history with the new tokens.
    """
    padded = np.full(len(history.text), len(sequences.remaining), np.int32)
    padded[: len(index)] = index
    return _decode(engine.weights, sequences, history, padded, np.int32(num_tokens))


def _order(vocab_size: int) -> int:
    return BYTE_ORDER if vocab_size <= BYTE_VOCAB else ORDER


def _hashes(tokens: Any, order: int) -> Any:
    """Hash all n-grams of ``tokens [T]``, a NumPy or JAX array: ``[T - order + 1]``."""
    count = len(tokens) - order + 1
    hashes: Any = np.uint32(0)
    for i in range(order):
        hashes = hashes * np.uint32(0x9E3779B1) + tokens[i : i + count].astype(np.uint32)
    return (hashes >> 15 ^ hashes) % RECENT


class _Carry(NamedTuple):
    """Carry of the loop over windows."""

    block: Block
    """WINDOW longer, since a window is put as a whole."""
    now: Sequences
    """Without `state`."""
    state: PrefixState
    """After each token of the last window of each sequence: of b WINDOW slots."""
    slot: Int[Array, "b"]
    """Of the state after the last accepted token."""
    table: Int[Array, "b RECENT"]
    limit: Int[Array, "b"]
    """Length of the next draft, at most: it doubles while drafts are accepted."""


@functools.partial(jax.jit, donate_argnums=(1, 2))
def _decode(
    weights: DecoderWeights,
    sequences: Sequences,
    history: History,
    index: Int[Array, "b"],
    num_tokens: Int[Array, ""],
) -> tuple[Block, Sequences, History]:
    start = jax.tree.map(lambda x: jnp.take(x, index, axis=0, mode="clip"), sequences)
    is_active = index < len(sequences.remaining)
    batch, vocab_size = start.state.logits.shape
    settings, order = start.settings, _order(vocab_size)
    with_penalties, with_logprobs, keys = options_of(start, is_active)
    draft: Any = jax.vmap(functools.partial(_draft, order))
    record: Any = jax.vmap(functools.partial(_record, order))

    # Of the states after each token of a window.
    slots = jnp.arange(batch * WINDOW, dtype=jnp.int32).reshape(batch, WINDOW)

    def put(all: Array, some: Array, place: Array) -> Array:
        for n in range(batch):
            at: tuple[Any, ...] = n, place[n], *[0] * (all.ndim - 2)
            all = lax.dynamic_update_slice(all, some[n : n + 1], at)
        return all

    def is_stop(tokens: Array) -> Array:
        return jnp.take_along_axis(settings.is_stop, tokens, axis=1)

    def is_unfinished(c: _Carry) -> Array:
        return is_active & (c.now.remaining > 0) & (c.block.counts < num_tokens)

    def accept(logits: Array, now: Sequences, window: Array, num_drafts: Array) -> Array:
        """Return how many drafts equal the tokens that are drawn after those before them."""
        length = WINDOW - 1
        repeat = functools.partial(jax.tree.map, lambda x: jnp.repeat(x, length, axis=0))
        place = jnp.arange(length)
        new = jnp.tile(1 + place, batch)
        # Drafts before a token count as accepted: it is used only if they are.
        each = count_tokens(repeat(now), with_penalties, repeat(window), new)
        drawn = next_token(
            logits[:, :-1].reshape(-1, vocab_size),
            each.settings,
            each.penalties,
            with_penalties,
            repeat(keys),
            each.position + new,
        )
        drafts = window[:, 1:]
        # A stop id is never accepted: it is the first token of a window, which may end a sequence.
        is_right = (drawn.reshape(batch, length) == drafts) & ~is_stop(drafts)
        is_right &= place[None] < num_drafts[:, None]
        return jnp.sum(jnp.cumprod(is_right.astype(jnp.int32), axis=1), axis=1)

    def decode_window(c: _Carry) -> _Carry:
        is_decoded, now, block = is_unfinished(c), c.now, c.block
        before = c.state.logits[c.slot]
        token = next_token(before, settings, now.penalties, with_penalties, keys, now.position)
        is_last = is_stop(token[:, None])[:, 0]
        drafts, is_found = draft(history.text, block.tokens, c.table, block.counts, token)
        most = jnp.minimum(now.remaining, num_tokens - block.counts) - 1
        is_read = is_decoded & ~is_last
        num_drafts = jnp.where(is_read & is_found, jnp.minimum(c.limit, most), 0)
        window = jnp.concatenate([token[:, None], drafts], axis=1)
        num_read = jnp.where(is_read, 1 + num_drafts, 0)
        read = jnp.concatenate([c.slot[:, None], slots], axis=1)
        layers, logits = c.state
        logits, _, layers = decode_tokens(weights, window, num_read, logits, layers, read)
        state, logits = PrefixState(layers, logits), logits.reshape(batch, WINDOW, vocab_size)
        accepted = lax.cond(
            jnp.any(num_drafts > 0),
            accept,
            lambda *_: jnp.zeros(batch, jnp.int32),
            logits,
            now,
            window,
            num_drafts,
        )
        new = jnp.where(is_decoded, 1 + accepted, 0)
        logprobs = None
        if block.logprobs is not None:
            rows = jnp.concatenate([before[:, None], logits[:, :-1]], axis=1)
            logprobs = lax.cond(
                with_logprobs,
                token_logprobs,
                no_logprobs,
                rows.reshape(-1, vocab_size),
                window.reshape(-1),
            )
            logprobs = jax.tree.map(lambda x: x.reshape(batch, WINDOW, *x.shape[1:]), logprobs)
        block = block._replace(
            tokens=put(block.tokens, window, block.counts),
            counts=block.counts + new,
            accepted=block.accepted + accepted,
            logprobs=jax.tree.map(lambda x, y: put(x, y, c.block.counts), block.logprobs, logprobs),
        )
        now = count_tokens(now, with_penalties, window, new)
        now = now._replace(
            position=now.position + new,
            remaining=jnp.where(is_decoded & is_last, 0, now.remaining - new),
        )
        table = record(history.text, block.tokens, c.table, c.block.counts, new)
        slot = jnp.where(is_read, slots[:, 0] + accepted, c.slot)
        limit = jnp.minimum(2 * accepted, WINDOW - 2) + 1
        return _Carry(block, now, state, slot, table, limit)

    state = jax.tree.map(lambda x: jnp.repeat(x, WINDOW, axis=0), start.state)
    block, no_state = empty_block(start, MAX_BLOCK + WINDOW), cast(Any, None)
    end = lax.while_loop(
        lambda c: jnp.any(is_unfinished(c)),
        decode_window,
        _Carry(
            block,
            start._replace(state=no_state),
            state,
            slots[:, 0],
            history.table,
            block.counts + 1,
        ),
    )
    block, now = end.block, end.now
    text = jnp.concatenate([history.text, block.tokens], axis=1)
    recent = [lax.dynamic_slice(text[n], block.counts[n : n + 1], (RECENT,)) for n in range(batch)]
    history = History(jnp.stack(recent), end.table - block.counts[:, None])
    tokens, logprobs = jax.tree.map(lambda x: x[:, :MAX_BLOCK], (block.tokens, block.logprobs))
    has_ended = ~jnp.any(is_active & (now.remaining > 0))
    block = block._replace(tokens=tokens, logprobs=logprobs, has_ended=has_ended)
    now = now._replace(state=jax.tree.map(lambda x: x[end.slot], end.state))
    replaced = jax.tree.map(lambda x, y: x.at[index].set(y, mode="drop"), sequences, now)
    return block, replaced, history


def _ngram(text: Array, tokens: Array, start: Array, length: int) -> Array:
    """Return `length` tokens of a history's text and the new tokens after it, from a place on."""
    place = start + jnp.arange(length)
    old = jnp.take(text, place, mode="clip")
    return jnp.where(place < RECENT, old, jnp.take(tokens, place - RECENT, mode="clip"))


def _draft(
    order: int, text: Array, tokens: Array, table: Array, count: Array, token: Array
) -> tuple[Array, Array]:
    """Return what followed the newest match of the n-gram that `token` completes, the next one.

    A match that overlaps what it predicts repeats itself. False is returned if there is none.
    """
    end = RECENT + count
    ngram = jnp.append(_ngram(text, tokens, end - order + 1, order - 1), token)
    match = table[_hashes(ngram, order)[0]]
    is_match = jnp.all(_ngram(text, tokens, match - order + 1, order) == ngram) & (match >= 0)
    followed = _ngram(text, tokens, match + 1, WINDOW - 1)
    place = jnp.arange(WINDOW - 1) % (end - match)
    return jnp.where(match + 1 + place < end, followed[place], token), is_match


def _record(
    order: int, text: Array, tokens: Array, table: Array, count: Array, new: Array
) -> Array:
    """Put the n-grams that end with the `new` tokens after the first `count` into the table."""
    end, place = RECENT + count, jnp.arange(WINDOW)
    ngrams = _ngram(text, tokens, end - order + 1, WINDOW + order - 1)
    hashes = jnp.where(place < new, _hashes(ngrams, order), RECENT)
    return table.at[hashes].set(end + place, mode="drop")
