"""Checks of ranks, shapes and dtypes of arguments at trace time, with uniform messages.

Errors name the argument of the public function. Ranks and dtypes are static; sizes are compared
with ``==`` only, so that dimensions of `jax.export` may be symbolic.

Operations of `ops` and modules of `models` raise ValueError for wrong ranks and shapes, and
TypeError for wrong dtypes.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

FLOATING = ("float32", "bfloat16", "float16", "float64")
INTEGER = ("int32", "int64", "int16", "int8", "uint8", "uint16", "uint32", "uint64")
BOOL = ("bool",)

_NAMES = {FLOATING: "floating point", INTEGER: "integer", BOOL: "bool"}

Sizes = dict[str, Any]


def accumulator_dtype(*arrays: Any) -> Any:
    """Return the accumulation dtype of arrays or dtypes: float64 if one is, else float32."""
    dtypes = [jnp.dtype(getattr(x, "dtype", x)) for x in arrays]
    return jnp.dtype("float64" if jnp.dtype("float64") in dtypes else "float32")


def check_array(
    name: str, x: Any, axes: str, dtypes: tuple[str, ...] = FLOATING, sizes: Sizes | None = None
) -> Sizes:
    """Check the axes and the dtype of an argument.

    Args:
      name: name of the argument.
      x: the argument.
      axes: names of its axes, as in ``"B T D"``; a leading ``...`` is any number of axes, ``B?`` an
        axis of size B or 1.
      dtypes: names of its possible dtypes.
      sizes: known sizes of axes; None is none.

    Returns:
      `sizes`, with those of all named axes.

    Raises:
      ValueError: wrong rank or shape.
      TypeError: not an array, or of another dtype.
    """
    any_leading, names = axes.startswith("..."), axes.replace("...", "").split()
    sizes = sizes or {}
    found, fits = dict(sizes), _is_array(x)
    if fits:
        fits = x.ndim >= len(names) if any_leading else x.ndim == len(names)
        for axis, size in zip(reversed(names), reversed(x.shape), strict=False):
            expected = found.setdefault(axis.rstrip("?"), size)
            fits = fits and bool(size == expected or (axis.endswith("?") and size == 1))
        if fits and str(x.dtype) in dtypes:
            return found
    shown = [f"{axis[:-1]} or 1" if axis.endswith("?") else axis for axis in names]
    wanted = f"[{', '.join(['...'] * any_leading + shown)}]"
    known = {axis: sizes[axis] for axis in (axis.rstrip("?") for axis in names) if axis in sizes}
    if known:
        wanted += " with " + ", ".join(f"{axis} = {size}" for axis, size in known.items())
    wanted += f", {_NAMES.get(dtypes) or ' or '.join(dtypes)}"
    error = TypeError if fits or not _is_array(x) else ValueError
    raise error(f"{name}: expected {wanted}; got {_describe(x)}")


def check_dtype(name: str, dtype: Any) -> None:
    """Raise TypeError unless `dtype` is a floating-point dtype."""
    if str(jnp.dtype(dtype)) not in FLOATING:
        raise TypeError(f"{name}: expected one of {', '.join(FLOATING)}; got {dtype}")


def check_segment_ids(segment_ids: Any | None, sizes: Sizes) -> None:
    """Check that `segment_ids` is None or integers ``[B, T]``; raises what `check_array` does."""
    if segment_ids is not None:
        check_array("segment_ids", segment_ids, "B T", INTEGER, sizes)


def check_batch(name: str, tree: Any, batch: Any) -> None:
    """Check that all leaves are arrays ``[batch, ...]``; raises ValueError or TypeError."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        where = f"{name}{jax.tree_util.keystr(path)}"
        if not _is_array(leaf):
            raise TypeError(f"{where}: expected an array; got {_describe(leaf)}")
        if leaf.ndim == 0 or leaf.shape[0] != batch:
            raise ValueError(f"{where}: expected [B, ...] with B = {batch}; got {_describe(leaf)}")


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray | np.generic) or hasattr(x, "__jax_array__")


def _describe(x: Any) -> str:
    if not _is_array(x):
        return type(x).__name__
    return f"{x.dtype}[{', '.join(map(str, x.shape))}]"
