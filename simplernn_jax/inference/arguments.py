"""Checks of the arguments of inference: each returns the value in its own type or raises one line.

An id outside the vocabulary would not fail later: the embedding gives NaN for it.
"""

import contextlib
import math
import numbers
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from simplernn_jax.devices import check_memory
from simplernn_jax.errors import UserError
from simplernn_jax.inference.sampling import Sampling
from simplernn_jax.models import LanguageModel

_TokenIds = Sequence[int | np.integer] | np.ndarray | jax.Array
Prompts = Sequence[_TokenIds] | _TokenIds
"""B sequences of token ids, a [B, T] integer array, or one flat sequence."""

_MAX_TOKENS = 2**31 - 1
"""New tokens of a sequence in one call: positions are int32."""

_TOKENIZER = ("vocab_size", "bos_id", "eos_id", "pad_id", "encode", "decode_bytes")


def checked_integer(
    name: str, value: Any, least: int, most: float = math.inf, advice: str = ""
) -> int:
    """Convert an integer, no bool, to ``int``; raises `UserError` outside of ``[least, most]``."""
    bounds = f", at least {least}" if most == math.inf else f" in [{least}, {most}]"
    return _checked(int, name, value, f"an integer{bounds}{advice}", lambda x: least <= x <= most)


def _checked(
    convert: type, name: str, value: Any, allowed: str, is_allowed: Callable[[Any], bool]
) -> Any:
    """Convert `value` to ``int`` or ``float``; anything else is rejected."""
    scalar = value
    if isinstance(value, jax.Array | np.ndarray) and value.ndim == 0:
        scalar = as_array(value, name).item()
    kind = numbers.Integral if convert is int else numbers.Real
    with contextlib.suppress(OverflowError):
        if isinstance(scalar, kind) and not isinstance(scalar, bool | np.bool_):
            number = convert(scalar)
            if is_allowed(number):
                return number
    raise UserError(f"{name}={_shown(value)}: must be {allowed}")


def _shown(value: Any) -> str:
    try:
        return repr(value)
    except Exception:  # of a class that cannot, or an integer of too many digits
        return type(value).__name__


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


def check_tokenizer(tokenizer: Any, *methods: str) -> None:
    """Raise `UserError` if `tokenizer` lacks an attribute of `Tokenizer` or one of `methods`."""
    missing = [name for name in (*_TOKENIZER, *methods) if not hasattr(tokenizer, name)]
    if missing:
        raise UserError(
            f"tokenizer: {type(tokenizer).__name__} has no {missing[0]}; pass that of load_model"
        )


def check_callback(name: str, value: Callable[..., Any] | None) -> None:
    """Raise `UserError` if `value` is neither None nor callable."""
    if value is not None and not callable(value):
        raise UserError(f"{name}={_shown(value)}: must be a function, or None")


def checked_path(path: Any) -> str:
    """Convert the path of a file to text; `UserError` if it is not a path, empty or holds a NUL."""
    if not isinstance(path, str | os.PathLike):
        raise UserError(f"path={_shown(path)}: must be the path of a file")
    name = os.fsdecode(path)
    with contextlib.suppress(UnicodeEncodeError):  # of half a surrogate pair
        if name and b"\0" not in os.fsencode(name):
            return name
    raise UserError(f"path={name!r}: cannot be the name of a file")


def as_array(value: Any, where: str) -> np.ndarray:
    """Convert to an array of NumPy, or raise `UserError`, which begins with `where`."""
    try:
        return np.asarray(value)
    except (ValueError, TypeError) as error:  # of unequal lengths, or without a value
        raise UserError(f"{where}: no flat sequence of token ids ({error})") from error


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
    temperature = _checked(float, "temperature", temperature, allowed, lambda x: 0 <= x < math.inf)
    top_k = checked_integer("top_k", top_k, 0, advice="; 0 is off")
    allowed = "above 0 and at most 1; 1 is off"
    top_p = _checked(float, "top_p", top_p, allowed, lambda x: 0 < x <= 1)
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
    if isinstance(prompts, bytes | bytearray) or not isinstance(prompts, Sequence):
        raise UserError(f"prompts: {type(prompts).__name__}; pass a text, or a list of texts")
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise UserError(f"prompt {index}: {type(prompt).__name__}; pass a text")
    return list(prompts)


def checked_prompts(
    prompts: Prompts | None, vocab_size: int, batch_size: int | None
) -> list[np.ndarray]:
    """Convert the prompts to 1-D int32 arrays, one per sequence.

    Args:
      prompts: as for `generate`.
      vocab_size: ids are below it.
      batch_size: sequences of the state to prefill, whose prompts may be empty; None without one.

    Raises:
      UserError: says which prompt is wrong, and where.
    """
    if prompts is None:
        if batch_size is None:
            raise UserError("prompts: none given; pass at least one, or a state to continue from")
        return [np.zeros(0, np.int32)] * batch_size
    if isinstance(prompts, jax.Array):
        prompts = as_array(prompts, "prompts")
    is_array = isinstance(prompts, np.ndarray) and prompts.ndim > 0
    if not is_array and (isinstance(prompts, str | bytes) or not isinstance(prompts, Sequence)):
        raise UserError(
            f"prompts: {type(prompts).__name__}; pass sequences of token ids, or call generate_text"
        )
    sequences: Any = [prompts] if len(prompts) > 0 and _is_id(prompts[0]) else prompts
    checked = [
        _checked_ids(ids, vocab_size, f"prompt {index}") for index, ids in enumerate(sequences)
    ]
    if batch_size is not None and len(checked) != batch_size:
        raise UserError(
            f"prompts: {len(checked)} for a state of {batch_size} sequences; pass one for each"
        )
    if not checked:
        raise UserError("prompts: none given; pass at least one")
    for index, prompt in enumerate(checked):
        if batch_size is None and len(prompt) == 0:
            raise UserError(f"prompt {index}: has no token; begin it with BOS, or pass a state")
    return checked


def _is_id(value: Any) -> bool:
    return not hasattr(value, "__len__") or getattr(value, "ndim", None) == 0


def checked_length(max_new_tokens: Any, batch_size: int) -> int:
    """Convert `max_new_tokens` to ``int``; raises `UserError` if they do not fit in memory."""
    length = checked_integer("max_new_tokens", max_new_tokens, 0, _MAX_TOKENS)
    what = f"max_new_tokens={length}"
    check_memory(
        batch_size * length * np.dtype(np.int32).itemsize, what, "generate fewer at a time"
    )
    return length


def _checked_ids(ids: Any, vocab_size: int, where: str) -> np.ndarray:
    ids = as_array(ids, where)
    if ids.dtype.kind in "US":
        raise UserError(f"{where}: text; pass token ids, or call generate_text")
    if ids.ndim != 1:
        raise UserError(f"{where}: has {ids.ndim} axes; pass one flat sequence of token ids")
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
