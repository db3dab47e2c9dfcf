"""What `generate` is asked for, checked where it enters.

An id outside the vocabulary would not fail later: the embedding gives NaN for it.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from simplernn_jax.errors import UserError
from simplernn_jax.inference.programs import Settings

Prompts = Sequence[Sequence[int] | np.ndarray | jax.Array] | np.ndarray | jax.Array
"""B sequences of token ids, a [B, T] integer array, or one flat sequence."""


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
      UserError: names a setting outside its range and the range.
    """
    if not (math.isfinite(temperature) and temperature >= 0):
        raise UserError(f"temperature={temperature}: must be a finite number, at least 0")
    if top_k < 0:
        raise UserError(f"top_k={top_k}: must be at least 0; 0 is off")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p={top_p}: must be above 0 and at most 1; 1 is off")
    if not 0 <= seed < 2**32:
        raise UserError(f"seed={seed}: must be in [0, 2**32)")
    is_banned = np.zeros(vocab_size, np.bool_)
    is_banned[_checked_ids(np.asarray(banned_ids, np.int64), vocab_size, "banned_ids")] = True
    if is_banned.all():
        raise UserError("banned_ids: all tokens are banned; leave at least one")
    if eos_id is not None:
        _checked_ids(np.asarray([eos_id]), vocab_size, "eos_id")
    return Settings(
        key=jax.random.key(np.uint32(seed)),
        temperature=jnp.float32(temperature),
        top_k=jnp.int32(min(top_k, vocab_size)),
        top_p=jnp.float32(top_p),
        eos_id=jnp.int32(-1 if eos_id is None else eos_id),
        is_banned=jnp.asarray(is_banned),
    )


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
        prompts = np.asarray(prompts)
    if len(prompts) > 0 and np.ndim(prompts[0]) == 0:
        prompts = [prompts]  # type: ignore[list-item]
    rows = [
        _checked_ids(np.asarray(prompt), vocab_size, f"prompt {index}")
        for index, prompt in enumerate(prompts)
    ]
    if num_rows is not None and len(rows) != num_rows:
        raise UserError(f"prompts: {len(rows)} rows for a state of {num_rows}; give as many")
    if not rows:
        raise UserError("prompts: none given; give at least one")
    for index, row in enumerate(rows):
        if num_rows is None and len(row) == 0:
            raise UserError(f"prompt {index}: has no token; begin it with BOS, or give a state")
    return rows


def _checked_ids(ids: np.ndarray, vocab_size: int, where: str) -> np.ndarray:
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
