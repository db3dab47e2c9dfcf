"""Shardings of the arrays of a run, from their logical axes, and arrays sharded over processes."""

import math
from typing import Any, TypeGuard

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from simplernn_jax.array_types import LogicalAxes
from simplernn_jax.parallel.mesh import partition_spec

P = PartitionSpec


def is_distributed(mesh: Mesh | None) -> TypeGuard[Mesh]:
    """Return whether several devices share the work."""
    return mesh is not None and mesh.size > 1


def is_on_cpu(mesh: Mesh | None) -> bool:
    """Return whether the devices, None for the first one, are CPUs."""
    device: jax.Device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    return device.platform == "cpu"


def variable_specs(tree: Any, mesh: Mesh) -> Any:
    """Return the `PartitionSpec` of every array of a tree of `nnx.Variable` and other arrays.

    The logical axes of a variable are its metadata ``axes``; the moments that an optimizer keeps of
    a parameter have the parameter's axes. All other arrays are replicated.
    """

    def spec_of(leaf: Any) -> Any:
        if not isinstance(leaf, nnx.Variable):
            return P()
        axes = leaf.get_metadata("axes", LogicalAxes())
        return jax.tree.map(lambda _: partition_spec(axes, mesh), leaf)

    return jax.tree.map(spec_of, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def axes_specs(axes: Any, mesh: Mesh) -> Any:
    """Return the `PartitionSpec` of every `LogicalAxes` of a tree."""
    return jax.tree.map(lambda each: partition_spec(each, mesh), axes)


def named_shardings(specs: Any, mesh: Mesh) -> Any:
    """Return the `NamedSharding` of every `PartitionSpec` of a tree."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def shard_further(tree: Any, specs: Any, axis: str, mesh: Mesh) -> Any:
    """Return `specs` with every leaf of `tree` sharded over `axis` too, where it is divisible."""

    def spec_of(leaf: Any, spec: PartitionSpec) -> PartitionSpec:
        names = [*spec, *[None] * (leaf.ndim - len(spec))]
        for place, size in enumerate(leaf.shape):
            present = names[place] if isinstance(names[place], tuple) else (names[place],)
            together = (*(name for name in present if name), axis)
            if size % math.prod(mesh.shape[name] for name in together) == 0:
                return P(*names[:place], together, *names[place + 1 :])
        return spec

    return jax.tree.map(spec_of, tree, specs)


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
