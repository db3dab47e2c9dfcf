"""Checks of arguments: rank, shape and dtype, when a function is traced, with one form of message.

A wrong call then fails where it was made, by the name of the argument, and not inside of what it
called. Sizes are compared with ``==`` only, so that dimensions of `jax.export` may be symbols.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

FLOATING = ("float32", "bfloat16", "float16", "float64")
INTEGER = ("int32", "int64", "int16", "int8", "uint8", "uint16", "uint32", "uint64")
BOOL = ("bool",)

_NAMES = {FLOATING: "floating point", INTEGER: "integer", BOOL: "bool"}

Sizes = dict[str, Any]


def check_array(
    name: str, x: Any, axes: str, dtypes: tuple[str, ...] = FLOATING, sizes: Mapping[str, Any] = {}
) -> Sizes:
    """Check the axes and the dtype of an argument.

    Args:
      name: of the argument, as the caller knows it.
      x: the argument.
      axes: names of its axes, as in ``"B T D"``; ``...`` in front stands for any number of axes,
        and ``B?`` for an axis of size B or 1.
      dtypes: names of the dtypes that it may have.
      sizes: of axes whose size is known; the others may have any.

    Returns:
      `sizes`, with those of all named axes.

    Raises:
      ValueError: wrong rank or shape.
      TypeError: not an array, or of another dtype.
    """
    names = axes.split()
    any_leading = names[:1] == ["..."]
    names = names[any_leading:]
    if not _is_array(x):
        wanted = _expected(names, any_leading, dtypes, sizes)
        raise TypeError(f"{name}: expected an array {wanted}; got {type(x).__name__}")
    found = dict(sizes)
    shape = tuple(x.shape)
    fits = len(shape) >= len(names) if any_leading else len(shape) == len(names)
    if fits:
        trailing = shape[len(shape) - len(names) :]
        for axis, size in zip(names, trailing, strict=True):
            if axis.endswith("?"):
                fits = fits and bool(size == 1 or size == found[axis[:-1]])
            else:
                fits = fits and bool(size == found.setdefault(axis, size))
    fits_dtype = str(x.dtype) in dtypes
    if fits and fits_dtype:
        return found
    wanted = _expected(names, any_leading, dtypes, sizes)
    error = TypeError if fits else ValueError
    raise error(f"{name}: expected {wanted}; got {_described(x)}")


def check_dtype(name: str, dtype: Any) -> None:
    """Check that `dtype` is one of floating point.

    Raises:
      TypeError: it is another one, or none at all.
    """
    if str(jnp.dtype(dtype)) not in FLOATING:
        raise TypeError(f"{name}: expected one of {', '.join(FLOATING)}; got {dtype}")


def check_recurrence(
    q: Any,
    k: Any,
    v: Any,
    log_gate: Any,
    initial_state: Any | None,
    segment_ids: Any | None,
    *,
    clear: Any | None = None,
) -> None:
    """Check the arguments that every way of computing the recurrence takes.

    Raises:
      ValueError: wrong ranks, or shapes that do not fit together.
      TypeError: wrong dtypes.
    """
    sizes = check_array("q", q, "B T H K")
    check_array("k", k, "B T H K", FLOATING, sizes)
    sizes = check_array("v", v, "B T H V", FLOATING, sizes)
    check_array("log_gate", log_gate, "B T H K", FLOATING, sizes)
    if initial_state is not None:
        check_array("initial_state", initial_state, "B H K V", FLOATING, sizes)
    check_segment_ids(segment_ids, sizes)
    if clear is not None:
        check_array("clear", clear, "B T", BOOL, sizes)


def check_convolution(x: Any, weights: Any, recent: Any, starts: Any | None) -> None:
    """Check the arguments of `rms_norm_convolution`.

    Raises:
      ValueError: wrong ranks, or shapes that do not fit together.
      TypeError: wrong dtypes.
    """
    sizes = check_array("x", x, "B T D")
    sizes = check_array("weights", weights, "W D", FLOATING, sizes)
    if sizes["W"] == 0:
        raise ValueError(f"weights: expected at least one row; got {_described(weights)}")
    sizes["P"] = sizes["W"] - 1
    check_array("recent", recent, "B P D", FLOATING, sizes)
    if starts is not None:
        check_array("starts", starts, "B T", BOOL, sizes)


def check_segment_ids(segment_ids: Any | None, sizes: Mapping[str, Any]) -> None:
    """Check that `segment_ids` is None or ``[B, T]``, with B and T of `sizes`, of integers."""
    if segment_ids is not None:
        check_array("segment_ids", segment_ids, "B T", INTEGER, sizes)


def check_batch(name: str, tree: Any, batch: Any) -> None:
    """Check that all leaves of a state are arrays whose first axis is `batch`.

    Raises:
      ValueError: a leaf has no such axis, or one of another size.
      TypeError: a leaf is not an array.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        where = f"{name}{jax.tree_util.keystr(path)}"
        if not _is_array(leaf):
            raise TypeError(f"{where}: expected an array; got {type(leaf).__name__}")
        if leaf.ndim == 0 or leaf.shape[0] != batch:
            raise ValueError(f"{where}: expected [B, ...] with B = {batch}; got {_described(leaf)}")


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray | np.generic) or hasattr(x, "__jax_array__")


def _expected(
    names: list[str], any_leading: bool, dtypes: tuple[str, ...], sizes: Mapping[str, Any]
) -> str:
    shown = ["..."] * any_leading + [
        f"{name[:-1]} or 1" if name.endswith("?") else name for name in names
    ]
    known = [name.rstrip("?") for name in names if name.rstrip("?") in sizes]
    text = f"[{', '.join(shown)}]"
    if known:
        text += " with " + ", ".join(f"{name} = {sizes[name]}" for name in dict.fromkeys(known))
    return f"{text}, {_NAMES.get(dtypes) or ' or '.join(dtypes)}"


def _described(x: Any) -> str:
    return f"{x.dtype}[{', '.join(map(str, x.shape))}]"
