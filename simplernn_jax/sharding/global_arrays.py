"""Global arrays, sharded over the devices of all processes."""

from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec


def process_slice(sharding: NamedSharding, length: int) -> slice:
    """Return the slice of a first axis of size `length` that this process's devices hold."""
    indices = sharding.addressable_devices_indices_map((length,)).values()
    ranges = [index[0].indices(length) for index in indices if index is not None]
    return slice(min(start for start, *_ in ranges), max(stop for _, stop, _ in ranges))


def global_arrays_from_local(local: Any, shardings: Any, start: int, length: int) -> Any:
    """Assemble a tree of global arrays from each process's slice of the first axis.

    Args:
      local: tree of numpy arrays: this process's slice of each array, which covers the shards of
        its devices (`process_slice`).
      shardings: shardings of the global arrays.
      start: index in the global arrays where `local` starts.
      length: size of the first axis of the global arrays.
    """

    def assemble(leaf: Any, sharding: NamedSharding) -> jax.Array:
        def shard(index: tuple[slice, ...] | None) -> Any:
            assert index is not None
            begin, end, _ = index[0].indices(length)
            return leaf[(slice(begin - start, end - start), *index[1:])]

        return jax.make_array_from_callback((length, *leaf.shape[1:]), sharding, shard)

    return jax.tree.map(assemble, local, shardings)


def local_copy(tree: Any) -> Any:
    """Gather the arrays of `tree` onto one device of this process; to be called by every process.

    Arrays on one device are returned as they are.
    """
    leaves = jax.tree.leaves(tree)
    if all(len(leaf.sharding.device_set) == 1 for leaf in leaves):
        return tree
    replicated = NamedSharding(leaves[0].sharding.mesh, PartitionSpec())
    copies = jax.jit(_identity, out_shardings=replicated)(tree)
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), copies)


def _identity(tree: Any) -> Any:
    return tree
