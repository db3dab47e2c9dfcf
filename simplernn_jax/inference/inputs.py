"""What `generate` and its neighbors are asked for, checked where it enters.

An id outside the vocabulary would not fail later: the embedding gives NaN for it.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from simplernn_jax.devices import check_memory
from simplernn_jax.errors import UserError
from simplernn_jax.inference.arguments import as_array, checked_integer, checked_number
from simplernn_jax.inference.programs import Settings

Prompts = Sequence[Sequence[int] | np.ndarray | jax.Array] | np.ndarray | jax.Array
"""B sequences of token ids, a [B, T] integer array, or one flat sequence."""

MOST_TOKENS = 2**31 - 1
"""Tokens that one call writes per row: positions are int32."""


def checked_settings(
    vocab_size: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    eos_id: int | None,
    banned_ids: Sequence[int],
) -> Settings:
    """The settings of `generate` as arrays.

    Raises:
      UserError: names a setting of another type or outside its range, and the range.
    """
    temperature = checked_number("temperature", temperature, "a finite number, at least 0")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise UserError(f"temperature={temperature}: must be a finite number, at least 0")
    top_k = checked_integer("top_k", top_k, 0, None, "; 0 is off")
    top_p = checked_number("top_p", top_p, "above 0 and at most 1; 1 is off")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p={top_p}: must be above 0 and at most 1; 1 is off")
    seed = checked_integer("seed", seed, 0, 2**32 - 1)
    is_banned = np.zeros(vocab_size, np.bool_)
    is_banned[_checked_ids(banned_ids, vocab_size, "banned_ids")] = True
    if is_banned.all():
        raise UserError("banned_ids: all tokens are banned; leave at least one")
    if eos_id is not None:
        eos_id = checked_integer("eos_id", eos_id, 0, vocab_size - 1)
    largest = float(np.finfo(np.float32).max)
    return Settings(
        key=jax.random.key(np.uint32(seed)),
        temperature=jnp.float32(min(temperature, largest)),
        top_k=jnp.int32(min(top_k, vocab_size)),
        top_p=jnp.float32(top_p),
        eos_id=jnp.int32(-1 if eos_id is None else eos_id),
        is_banned=jnp.asarray(is_banned),
    )


def checked_texts(prompts: Any, num_rows: int) -> list[str]:
    """The prompts of `generate_text`, one per row; one text or None is for all `num_rows`.

    Raises:
      UserError: they are not texts.
    """
    if prompts is None or isinstance(prompts, str):
        return [prompts or ""] * num_rows
    if isinstance(prompts, bytes | bytearray) or not isinstance(prompts, Sequence):
        raise UserError(f"prompts: {type(prompts).__name__}; give a text, or a list of texts")
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise UserError(f"prompt {index}: {type(prompt).__name__}; give a text")
    return list(prompts)


def checked_prompts(
    prompts: Prompts | None, vocab_size: int, num_rows: int | None
) -> list[np.ndarray]:
    """The prompts as 1-D int32 arrays, one per row, all ids inside the vocabulary.

    Args:
      prompts: as for `generate`.
      vocab_size: ids are below it.
      num_rows: rows of the state that reads them, which may have nothing to read; None without.

    Raises:
      UserError: says which prompt is wrong, and where.
    """
    if prompts is None:
        if num_rows is None:
            raise UserError("prompts: none given; give at least one, or a state to go on from")
        return [np.zeros(0, np.int32)] * num_rows
    if isinstance(prompts, jax.Array):
        prompts = as_array(prompts, "prompts")
    is_array = isinstance(prompts, np.ndarray) and prompts.ndim > 0
    if not is_array and (isinstance(prompts, str | bytes) or not isinstance(prompts, Sequence)):
        raise UserError(f"prompts: {type(prompts).__name__}; give sequences of token ids")
    if len(prompts) > 0 and not hasattr(prompts[0], "__len__"):
        prompts = [prompts]  # type: ignore[list-item]
    elif len(prompts) > 0 and isinstance(prompts[0], jax.Array | np.ndarray):
        prompts = [prompts] if prompts[0].ndim == 0 else prompts  # type: ignore[list-item]
    rows = [
        _checked_ids(prompt, vocab_size, f"prompt {index}") for index, prompt in enumerate(prompts)
    ]
    if num_rows is not None and len(rows) != num_rows:
        raise UserError(f"prompts: {len(rows)} rows for a state of {num_rows}; give as many")
    if not rows:
        raise UserError("prompts: none given; give at least one")
    for index, row in enumerate(rows):
        if num_rows is None and len(row) == 0:
            raise UserError(f"prompt {index}: has no token; begin it with BOS, or give a state")
    return rows


def checked_length(max_new_tokens: Any, num_rows: int) -> int:
    """`max_new_tokens` as an ``int``, if that many tokens of `num_rows` rows fit into memory.

    Raises:
      UserError: they do not, or it is no integer or negative.
    """
    length = checked_integer("max_new_tokens", max_new_tokens, 0, MOST_TOKENS)
    what = f"max_new_tokens={length}"
    check_memory(num_rows * length * np.dtype(np.int32).itemsize, what, "write fewer at a time")
    return length


def _checked_ids(ids: Any, vocab_size: int, where: str) -> np.ndarray:
    ids = as_array(ids, where)
    if ids.ndim != 1:
        raise UserError(f"{where}: has {ids.ndim} axes; give one flat sequence of token ids")
    if len(ids) == 0:
        return np.zeros(0, np.int32)
    if not np.issubdtype(ids.dtype, np.integer):
        raise UserError(f"{where}: {ids.dtype} values; token ids are integers")
    outside = (ids < 0) | (ids >= vocab_size)
    if outside.any():
        at = int(np.argmax(outside))
        raise UserError(
            f"{where}: token {ids[at]} at position {at} is outside the vocabulary of {vocab_size}; "
            "encode with the tokenizer of this model"
        )
    return ids.astype(np.int32)
