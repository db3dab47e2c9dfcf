"""Partitioning of operations that are opaque to XLA's partitioner."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from simplernn_jax.ops.primitive import Implementation

MeshAxesByDim = Mapping[str, tuple[str, ...]]
"""Mesh axes over which each named axis is sharded; an empty tuple if it is not."""


@dataclasses.dataclass(frozen=True)
class Partitioned:
    """Partitioning by named axes of an operation's arrays, such as ``"b t d"``.

    An axis that several arrays share is sharded alike in all of them. Each device runs the
    implementation on its shards, which is correct along axes whose entries are independent.
    """

    inputs: tuple[str, ...]
    results: tuple[str, ...]
    replicated: tuple[str, ...]
    """Axes that are not sharded."""
    on_shards: Callable[[Implementation, MeshAxesByDim], Implementation] | None = None
    """Builds what each device runs; None is the implementation itself."""
    minimum: tuple[tuple[str, str], ...] = ()
    """Pairs of axes: a shard of the first must be at least as long as the second."""

    def __call__(self, impl: Implementation) -> Implementation:
        """Wrap `impl` in `custom_partitioning`."""
        partitioned = custom_partitioning(lambda *args: list(impl(*args)))
        partitioned.def_partition(
            partition=lambda *shapes: self._partition(impl, *shapes),
            sharding_rule=lambda *_: (
                f"{', '.join(self.inputs)} -> {', '.join(self.results)}",
                {"need_replication_factors": self.replicated},
            ),
        )
        return partitioned

    def _partition(self, impl: Implementation, mesh: Mesh, inputs: Any, results: Any) -> Any:
        sizes: dict[str, int] = {}
        mesh_axes: dict[str, tuple[str, ...]] = {}
        for names, x in zip(self.inputs, inputs, strict=True):
            sizes.update(zip(names.split(), x.shape, strict=True))
            for name, axes in zip(names.split(), x.sharding.spec, strict=False):
                wanted = _axis_names(axes)
                # Each mesh axis may shard one array axis; skip uneven shards, whose padding is
                # undefined.
                taken = {axis for others in mesh_axes.values() for axis in others}
                is_free = name not in {*self.replicated, *mesh_axes} and taken.isdisjoint(wanted)
                if wanted and is_free and sizes[name] % _count(mesh, wanted) == 0:
                    mesh_axes[name] = wanted
        mesh_axes = {name: mesh_axes.get(name, ()) for name in sizes}
        for name, other in self.minimum:
            if sizes[name] // _count(mesh, mesh_axes[name]) < sizes[other]:
                mesh_axes[name] = ()

        def shardings(arrays: Sequence[str]) -> list[NamedSharding]:
            specs = [P(*(mesh_axes[name] or None for name in names.split())) for names in arrays]
            return [NamedSharding(mesh, spec) for spec in specs]

        on_shard = impl if self.on_shards is None else self.on_shards(impl, mesh_axes)
        return mesh, on_shard, shardings(self.results), tuple(shardings(self.inputs))


def _axis_names(axes: Any) -> tuple[str, ...]:
    """Convert one entry of a `PartitionSpec` to a tuple of names."""
    if axes is None:
        return ()
    return (axes,) if isinstance(axes, str) else tuple(axes)


def _count(mesh: Mesh, axes: Sequence[str]) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)
