"""Collectives inside `jax.shard_map` by mesh axis name.

Outside of `shard_map`, or along an axis that the mesh does not have (or of size 1), they do
nothing: the same code runs on one device and on any mesh. Axes of size 1 never appear in varying
types, since `parallel.mesh` omits them from specs.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from simplernn_jax.ops.primitive import vary_over


def axis_size(name: str) -> int:
    """Return the number of devices along the axis `name`; 1 outside of `jax.shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.shape[name] if name in mesh.manual_axes else 1


def axis_index(name: str) -> jax.Array | int:
    """Return this device's index along the axis `name`; 0 outside of `jax.shard_map`."""
    return jax.lax.axis_index(name) if axis_size(name) > 1 else 0


def psum(tree: Any, *names: str) -> Any:
    """Sum each leaf over the devices of the axes `names`, on all of them."""
    sharded = tuple(name for name in names if axis_size(name) > 1)
    if not sharded:
        return tree
    return jax.lax.psum(jax.tree.map(lambda x: vary_over(x, frozenset(sharded)), tree), sharded)


def shift(x: jax.Array, name: str) -> jax.Array:
    """Receive the previous device's `x` along the axis `name`; zeros on the first device."""
    pairs = [(place, place + 1) for place in range(axis_size(name) - 1)]
    return jax.lax.ppermute(vary_over(x, frozenset([name])), name, pairs)


def broadcast_from_last(tree: Any, name: str) -> Any:
    """Broadcast the last device's arrays to all devices along the axis `name`."""
    size = axis_size(name)
    if size == 1:
        return tree
    is_last = axis_index(name) == size - 1
    return psum(jax.tree.map(lambda x: jnp.where(is_last, x, jnp.zeros_like(x)), tree), name)


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
