"""Draft tokens of speculative decoding, looked up in the history of a sequence: `cpu/draft.c`."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from simplernn_jax.ops.native import supports_native

RECENT = 1 << 14
"""Tokens of a sequence in which drafts are looked up."""


class History(NamedTuple):
    """The last tokens of N sequences, with an index of their n-grams; int32."""

    tokens: jax.Array
    """``[N, RECENT]``, a ring."""
    table: jax.Array
    """``[N, RECENT]`` positions after n-grams, by their hash."""
    cursor: jax.Array
    """``[N, 4]``: number of tokens; position after the newest match and its length; n."""


def empty_history(num_sequences: int, order: int) -> History:
    """Make the NumPy arrays of histories without tokens; a match has `order` tokens at least."""
    zeros = np.zeros((num_sequences, RECENT), np.int32)
    arrays: tuple[Any, ...] = (zeros, zeros, zeros[:, :4] + np.array([0, 0, 0, order], np.int32))
    return History(*arrays)


def draft_tokens(
    history: History,
    tokens: jax.Array,
    counts: jax.Array,
    following: jax.Array,
    limits: jax.Array,
    width: int,
) -> tuple[jax.Array, jax.Array, History]:
    """Append tokens to histories, and look up what may follow.

    Where the newest tokens came before, the tokens that followed there are the draft. The longer
    the match, the longer it is.

    Args:
      history: of N sequences; updated in place where XLA can.
      tokens: ``[N, T]`` int32.
      counts: ``[N]`` int32; the first tokens of each sequence that are appended.
      following: ``[N]`` int32, the token after them, which is not appended.
      limits: ``[N]`` int32; drafted tokens at most.
      width: W; at most W - 1 tokens are drafted.

    Returns:
      ``[N, W]``: `following`, then the drafted tokens, then zeros; ``[N]`` the number of the first
      two; and the histories.
    """
    if not supports_native(jnp.float32):
        raise ValueError("draft_tokens requires a CPU and a C compiler")
    arguments = [tokens, counts, following, limits, *history]
    drafted = jax.ShapeDtypeStruct((len(tokens), width), np.dtype(np.int32))
    results = [drafted, jax.typeof(counts), *map(jax.typeof, history)]
    aliases = {4: 2, 5: 3, 6: 4}
    called = jax.ffi.ffi_call("simplernn_draft", results, input_output_aliases=aliases)(*arguments)
    return called[0], called[1], History(*called[2:])


@jax.jit
def append_tokens(history: History, tokens: jax.Array, counts: jax.Array) -> History:
    """Append the first `counts` ``[N]`` of ``tokens [N, T]`` to histories."""
    none = jnp.zeros_like(counts)
    return draft_tokens(history, tokens, counts, none, none, 1)[2]
