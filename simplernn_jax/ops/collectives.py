"""Collectives inside `jax.shard_map`, by the names of the mesh axes, and the types of its arrays.

Along an axis that the mesh does not have, or outside of `shard_map`, each of them does nothing: the
same code runs on one device and on any mesh. Axes of one device never appear in the types of arrays
either, since `mesh_axes` leaves them out.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def axis_size(name: str) -> int:
    """Number of devices along the axis `name`; 1 outside of `jax.shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.shape[name] if name in mesh.manual_axes else 1


def axis_index(name: str) -> jax.Array | int:
    """This device's index along the axis `name`; 0 outside of `jax.shard_map`."""
    return jax.lax.axis_index(name) if axis_size(name) > 1 else 0


def varying(x: jax.Array) -> frozenset[str]:
    """The manual mesh axes over which `x` varies."""
    return frozenset(jax.typeof(x).manual_axis_type.varying)


def vary_like(x: jax.Array, *others: jax.Array) -> jax.Array:
    """`x`, typed as varying over every manual mesh axis that it or one of `others` varies over.

    The carry of a loop must have one type from start to end: the zero that starts it is the same on
    every device, what the loop adds is not. And the gradient of `x` then varies too: one call
    before several uses of an array sums their gradients over the devices once.
    """
    return _vary(x, frozenset[str]().union(*map(varying, others)))


def _vary(x: jax.Array, names: frozenset[str]) -> jax.Array:
    missing = tuple(sorted(names - varying(x)))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def psum(tree: Any, *names: str) -> Any:
    """Sum each leaf over the devices of the axes `names`, on all of them."""
    sharded = tuple(name for name in names if axis_size(name) > 1)
    if not sharded:
        return tree
    return jax.lax.psum(jax.tree.map(lambda x: _vary(x, frozenset(sharded)), tree), sharded)


def shift(x: jax.Array, name: str, by: int = 1) -> jax.Array:
    """`x` of the device `by` places before along the axis `name`; zeros where there is none."""
    size = axis_size(name)
    pairs = [(place, place + by) for place in range(size - by)]
    return jax.lax.ppermute(_vary(x, frozenset([name])), name, pairs)


def broadcast_from_last(x: jax.Array, name: str) -> jax.Array:
    """The last device's `x`, on all devices along the axis `name`."""
    size = axis_size(name)
    if size == 1:
        return x
    return psum(jnp.where(axis_index(name) == size - 1, x, jnp.zeros_like(x)), name)


def all_gather(shard: jax.Array, name: str, axis: int, *, after: jax.Array) -> jax.Array:
    """Concatenate the shards along the mesh axis `name`, along the array's `axis`.

    Not before `after` is computed: XLA would otherwise gather all that it can at the start of a
    program, and keep it.
    """
    if axis_size(name) == 1:
        return shard
    _, shard = jax.lax.optimization_barrier((jax.lax.stop_gradient(after), shard))
    return jax.lax.all_gather(shard, name, axis=axis, tiled=True)


def remat_all_gather(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, which gathers parameters again for its gradient instead of keeping them."""
    return jax.checkpoint(function) if axis_size("fsdp") > 1 else function
