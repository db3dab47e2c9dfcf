"""Collectives inside `jax.shard_map` by mesh axis name, and varying types of its arrays.

Outside of `shard_map`, or along an axis that the mesh does not have (or of size 1), they do
nothing: the same code runs on one device and on any mesh. Axes of size 1 never appear in varying
types, since `mesh_axes` omits them.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def axis_size(name: str) -> int:
    """Return the number of devices along the axis `name`; 1 outside of `jax.shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.shape[name] if name in mesh.manual_axes else 1


def axis_index(name: str) -> jax.Array | int:
    """Return this device's index along the axis `name`; 0 outside of `jax.shard_map`."""
    return jax.lax.axis_index(name) if axis_size(name) > 1 else 0


def varying(x: jax.Array | jax.ShapeDtypeStruct) -> frozenset[str]:
    """Return the manual mesh axes over which `x` varies."""
    return frozenset(jax.typeof(x).manual_axis_type.varying)


def vary_like(x: jax.Array, *others: jax.Array | jax.ShapeDtypeStruct) -> jax.Array:
    """Cast `x` to vary over every manual mesh axis that it or one of `others` varies over.

    The carry of a loop must have one type: its initial zeros are the same on every device, its next
    value is not. The gradient of the cast sums over the devices: one cast before several uses of an
    array takes one all-reduce for all their gradients.
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
    """Receive `x` from index - `by` along the axis `name` (`ppermute`); zeros if there is none."""
    size = axis_size(name)
    pairs = [(place, place + by) for place in range(size - by)]
    return jax.lax.ppermute(_vary(x, frozenset([name])), name, pairs)


def broadcast_from_last(x: jax.Array, name: str) -> jax.Array:
    """Broadcast the last device's `x` to all devices along the axis `name`."""
    size = axis_size(name)
    if size == 1:
        return x
    return psum(jnp.where(axis_index(name) == size - 1, x, jnp.zeros_like(x)), name)


def all_gather(shard: jax.Array, name: str, axis: int, *, after: jax.Array) -> jax.Array:
    """Concatenate the shards along the mesh axis `name`, along the array's `axis`.

    The gather waits for `after`: XLA would otherwise gather all parameters at the start of a
    program, and keep them in memory.
    """
    if axis_size(name) == 1:
        return shard
    _, shard = jax.lax.optimization_barrier((jax.lax.stop_gradient(after), shard))
    return jax.lax.all_gather(shard, name, axis=axis, tiled=True)


def remat_if_fsdp(function: Callable[..., Any]) -> Callable[..., Any]:
    """Rematerialize `function` under FSDP, so that gathered parameters are not saved."""
    return jax.checkpoint(function) if axis_size("fsdp") > 1 else function
