"""Checks of single arguments: each gives the value in its own type, or one clear line."""

import numbers
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from simplernn_jax.errors import UserError
from simplernn_jax.models import LanguageModel

_TOKENIZER = ("vocab_size", "bos_id", "eos_id", "pad_id", "encode", "decode_bytes")


def checked_integer(name: str, value: Any, least: int, most: int | None, advice: str = "") -> int:
    """`value` as an ``int``, which it is already or is of NumPy or JAX; a bool is none.

    Raises:
      UserError: it is something else or outside ``[least, most]``; None is no upper bound.
    """
    bounds = f", at least {least}" if most is None else f" in [{least}, {most}]"
    error = UserError(f"{name}={_shown(value)}: must be an integer{bounds}{advice}")
    value = _scalar(value)
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Integral):
        raise error
    number = int(value)
    if number < least or (most is not None and number > most):
        raise error
    return number


def check_model(model: Any) -> None:
    """Raises `UserError` if `model` is not a `LanguageModel`."""
    if not isinstance(model, LanguageModel):
        raise UserError(f"model: {type(model).__name__}; give the LanguageModel of load_model")


def check_tokenizer(tokenizer: Any, *methods: str) -> None:
    """Raises `UserError` if `tokenizer` lacks what a `Tokenizer` has, `methods` included."""
    missing = [name for name in (*_TOKENIZER, *methods) if not hasattr(tokenizer, name)]
    if missing:
        raise UserError(
            f"tokenizer: {type(tokenizer).__name__} has no {missing[0]}; give that of load_model"
        )


def check_callback(name: str, value: Callable[..., Any] | None) -> None:
    """Raises `UserError` if `value` is neither None nor to be called."""
    if value is not None and not callable(value):
        raise UserError(f"{name}={_shown(value)}: must be a function, or None")


def checked_path(path: Any) -> str:
    """The path of a file as text.

    Raises:
      UserError: it is no path, is empty or holds a NUL character.
    """
    if not isinstance(path, str | os.PathLike):
        raise UserError(f"path={_shown(path)}: must be the path of a file")
    name = os.fsdecode(path)
    if not name or "\0" in name:
        raise UserError(f"path={name!r}: cannot be the name of a file")
    return name


def checked_number(name: str, value: Any, allowed: str) -> float:
    """`value` as a ``float``; anything but a real number, such as a bool, is refused.

    Raises:
      UserError: says what is `allowed`.
    """
    value = _scalar(value)
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Real):
        raise UserError(f"{name}={_shown(value)}: must be {allowed}")
    try:
        return float(value)
    except OverflowError:
        raise UserError(f"{name}={_shown(value)}: must be {allowed}") from None


def as_array(value: Any, where: str) -> np.ndarray:
    """`value` as an array of NumPy.

    Raises:
      UserError: it is none, such as lists of unequal lengths; begins with `where`.
    """
    try:
        return np.asarray(value)
    except (ValueError, TypeError) as error:  # of unequal lengths, or without a value
        raise UserError(f"{where}: no flat sequence of token ids ({error})") from error


def _scalar(value: Any) -> Any:
    """What an array without axes holds; anything else as it is."""
    if isinstance(value, jax.Array | np.ndarray) and value.ndim == 0:
        return as_array(value, "a setting").item()
    return value


def _shown(value: Any) -> str:
    try:
        return repr(value)
    except Exception:  # of a class that cannot, or an integer of too many digits
        return type(value).__name__
