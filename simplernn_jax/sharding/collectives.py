"""What devices tell each other inside `jax.shard_map`, by the names of the mesh's axes.

Where an axis is not there, or has one device, each of these does nothing: the same code runs on
one device and on any mesh. Axes of one device never appear in the types of arrays either, since
`shardings.py` leaves them out.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from simplernn_jax.ops.manual_axes import varying


def is_on_mesh() -> bool:
    """Whether the code being traced is inside of `jax.shard_map`."""
    return bool(jax.sharding.get_abstract_mesh().manual_axes)


def axis_size(name: str) -> int:
    """Devices along the axis `name`; 1 outside of `jax.shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.shape[name] if name in mesh.manual_axes else 1


def axis_index(name: str) -> jax.Array | int:
    """This device's place along the axis `name`; 0 where there is one."""
    return jax.lax.axis_index(name) if axis_size(name) > 1 else 0


def vary(tree: Any, *names: str) -> Any:
    """The same values, typed as this device's own along the axes `names`.

    Their gradient is then its own too, not yet summed over them. One call before several uses of
    an array gives one sum of their gradients instead of one for each.
    """

    def cast(x: jax.Array) -> jax.Array:
        missing = tuple(name for name in _there(names) if name not in varying(x))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, tree)


def psum(tree: Any, *names: str) -> Any:
    """Sums each leaf over the devices of the axes `names`; the same on all of them after it."""
    there = _there(names)
    return jax.lax.psum(vary(tree, *there), there) if there else tree


def shift(tree: Any, name: str, by: int = 1) -> Any:
    """What lies `by` places before along the axis `name`; zeros where nothing does."""
    size = axis_size(name)
    pairs = [(place, place + by) for place in range(size - by)]
    return jax.tree.map(lambda x: jax.lax.ppermute(vary(x, name), name, pairs), tree)


def broadcast_from_last(x: jax.Array, name: str) -> jax.Array:
    """The last device's `x`, on all devices along the axis `name`."""
    size = axis_size(name)
    if size == 1:
        return x
    return psum(jnp.where(axis_index(name) == size - 1, x, jnp.zeros_like(x)), name)


def gather(part: jax.Array, name: str, axis: int, *, after: jax.Array) -> jax.Array:
    """The parts along the mesh axis `name`, one after another along the array's `axis`.

    Not before `after` is computed: the compiler would otherwise gather all that it can at the
    start of a program, and hold it.
    """
    if axis_size(name) == 1:
        return part
    _, part = jax.lax.optimization_barrier((jax.lax.stop_gradient(after), part))
    return jax.lax.all_gather(part, name, axis=axis, tiled=True)


def remat_all_gather(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, whose gradient gathers parameters once more rather than keep them until then."""
    return jax.checkpoint(function) if axis_size("fsdp") > 1 else function


def _there(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in names if axis_size(name) > 1)
