"""Arrays that lie on the devices of all processes: made of each one's part, and read by each."""

from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec


def rows_of_this_process(sharding: NamedSharding, rows: int) -> slice:
    """The rows of an array of `rows` rows that this process's devices hold.

    If they do not follow one another, those in between belong to it too.
    """
    indices = sharding.addressable_devices_indices_map((rows,)).values()
    ranges = [index[0].indices(rows) for index in indices if index is not None]
    return slice(min(start for start, *_ in ranges), max(stop for _, stop, _ in ranges))


def from_rows(local: Any, shardings: Any, first: int, rows: int) -> Any:
    """A tree of global arrays, to which every process gives some of the rows.

    Args:
      local: tree of numpy arrays: rows `first` and the following ones of each array.
      shardings: where the arrays of `rows` rows lie; of the rows, a process's devices hold at
        most those that it gives (`rows_of_this_process`).
      first: number of the first row in `local`.
      rows: of the whole arrays.
    """

    def whole(leaf: Any, sharding: NamedSharding) -> jax.Array:
        def part(index: tuple[slice, ...] | None) -> Any:
            assert index is not None
            start, stop, _ = index[0].indices(rows)
            return leaf[(slice(start - first, stop - first), *index[1:])]

        return jax.make_array_from_callback((rows, *leaf.shape[1:]), sharding, part)

    return jax.tree.map(whole, local, shardings)


def local_copy(tree: Any) -> Any:
    """`tree` as arrays on one device of this process, whole; to be called by every process.

    Arrays that lie on one device already are returned as they are.
    """
    leaves = jax.tree.leaves(tree)
    if all(len(leaf.sharding.device_set) == 1 for leaf in leaves):
        return tree
    everywhere = NamedSharding(leaves[0].sharding.mesh, PartitionSpec())
    copies = jax.jit(_identity, out_shardings=everywhere)(tree)
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), copies)


def _identity(tree: Any) -> Any:
    return tree
