"""Checks of the arguments of inference: each returns the value in its own type or raises one line.

An id outside the vocabulary would not fail later: the embedding gives NaN for it.
"""

import contextlib
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from simplernn_jax.errors import UserError
from simplernn_jax.inference.sampling import Sampling
from simplernn_jax.models import LanguageModel

_TokenIds = Sequence[int | np.integer] | np.ndarray | jax.Array
Prompts = Sequence[_TokenIds] | _TokenIds
"""B sequences of token ids, a [B, T] integer array, or one flat sequence."""


def checked_integer(name: str, value: Any, least: int, most: float = math.inf) -> int:
    """Convert an integer to ``int``; raises `UserError` outside of ``[least, most]``."""
    with contextlib.suppress(TypeError):
        if least <= (number := operator.index(value)) <= most:
            return number
    raise UserError(f"{name}={value!r}: must be an integer in [{least}, {most}]")


def _checked_real(name: str, value: Any, allowed: str, is_allowed: Callable[[Any], bool]) -> float:
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        if not isinstance(value, str) and is_allowed(number := float(value)):
            return number
    raise UserError(f"{name}={value!r}: must be {allowed}")


def check_model(model: Any) -> None:
    """Raise `UserError` if `model` is not a `LanguageModel`."""
    if not isinstance(model, LanguageModel):
        raise UserError(f"model: {type(model).__name__}; pass the LanguageModel of load_model")


def check_logits(logits: Any) -> None:
    """Raise `UserError` if logits of the model are not finite: it would generate nothing."""
    if not np.isfinite(logits).all():
        raise UserError(
            "the model's logits are not finite: its weights are corrupted or have diverged; use "
            "another checkpoint"
        )


def checked_sampling(
    vocab_size: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    eos_id: int | None,
    banned_ids: Sequence[int],
) -> Sampling:
    """Check the settings of `generate`; raises `UserError`, which names a wrong one."""
    allowed = "a finite number, at least 0"
    temperature = _checked_real("temperature", temperature, allowed, lambda x: 0 <= x < math.inf)
    top_k = checked_integer("top_k", top_k, 0)
    allowed = "above 0 and at most 1; 1 is off"
    top_p = _checked_real("top_p", top_p, allowed, lambda x: 0 < x <= 1)
    seed = checked_integer("seed", seed, 0, 2**32 - 1)
    banned = tuple(_checked_ids(banned_ids, vocab_size, "banned_ids").tolist())
    if len(set(banned)) == vocab_size:
        raise UserError("banned_ids: all tokens are banned; leave at least one")
    if eos_id is not None:
        eos_id = checked_integer("eos_id", eos_id, 0, vocab_size - 1)
    return Sampling(
        temperature=min(temperature, float(np.finfo(np.float32).max)),
        top_k=min(top_k, vocab_size),
        top_p=top_p,
        seed=seed,
        stop_ids=() if eos_id is None else (eos_id,),
        banned_ids=banned,
    )


def checked_texts(prompts: Any, batch_size: int) -> list[str]:
    """List the prompts of `generate_text`, or raise `UserError`; one text or None is for all."""
    if prompts is None or isinstance(prompts, str):
        return [prompts or ""] * batch_size
    if isinstance(prompts, list | tuple) and all(isinstance(prompt, str) for prompt in prompts):
        return list(prompts)
    raise UserError(f"prompts={prompts!r}: must be a text or a list of texts")


def checked_prompts(
    prompts: Prompts | None, vocab_size: int, batch_size: int | None, name: str = "prompt"
) -> list[np.ndarray]:
    """Convert the prompts to 1-D int32 arrays, one per sequence.

    Args:
      prompts: as for `generate`.
      vocab_size: ids are below it.
      batch_size: sequences of the state to prefill, whose prompts may be empty; None without one.
      name: what they are called in errors.

    Raises:
      UserError: says which prompt is wrong, and where.
    """
    if prompts is None and batch_size is not None:
        return [np.zeros(0, np.int32)] * batch_size
    given: Any = np.asarray(prompts) if isinstance(prompts, jax.Array) else prompts
    try:
        given = [given] if len(given) and np.ndim(given[0]) == 0 else list(given)
    except (TypeError, KeyError, ValueError) as error:
        raise UserError(
            f"{name}s: pass sequences of token ids, or call generate_text ({error})"
        ) from error
    checked = [_checked_ids(ids, vocab_size, f"{name} {index}") for index, ids in enumerate(given)]
    if batch_size is None:
        if not checked:
            raise UserError("prompts: none given; pass at least one")
        for index, prompt in enumerate(checked):
            if len(prompt) == 0:
                raise UserError(f"prompt {index}: has no token; begin it with BOS, or pass a state")
    elif len(checked) != batch_size:
        raise UserError(f"{name}s: {len(checked)} for {batch_size} sequences; pass one for each")
    return checked


def _checked_ids(ids: Any, vocab_size: int, where: str) -> np.ndarray:
    try:
        array = np.asarray(ids if len(ids) else np.zeros(0, np.int32))
        if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
            raise TypeError(f"{array.ndim} axes, {array.dtype}")
    except (ValueError, TypeError) as error:
        raise UserError(f"{where}: not a flat sequence of integer token ids ({error})") from error
    outside = (array < 0) | (array >= vocab_size)
    if outside.any():
        at = int(np.argmax(outside))
        raise UserError(
            f"{where}: token {array[at]} at position {at} is outside the vocabulary of "
            f"{vocab_size}; encode with the tokenizer of this model"
        )
    return array.astype(np.int32)
