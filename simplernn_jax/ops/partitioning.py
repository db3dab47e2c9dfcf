"""How an operation that XLA cannot look into is partitioned when its operands are sharded."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from simplernn_jax.ops.operation import Form


def axis_names(axes: Any) -> tuple[str, ...]:
    """One entry of a `PartitionSpec` as a tuple of names."""
    if axes is None:
        return ()
    return (axes,) if isinstance(axes, str) else tuple(axes)


@dataclasses.dataclass(frozen=True)
class Partitioned:
    """Names the axes of an operation's arrays, such as ``"b t d"``; wraps its forms.

    An axis that several arrays have is sharded alike in all of them. Each device runs the form on
    its shards, which is right for axes along which the operation is independent; the others are
    `replicated`.
    """

    inputs: tuple[str, ...]
    results: tuple[str, ...]
    replicated: tuple[str, ...]

    def __call__(self, form: Form) -> Form:
        """Wrap `form` in `custom_partitioning`."""
        partitioned = custom_partitioning(lambda *args: list(form(*args)))
        partitioned.def_partition(
            partition=lambda *shapes: self._partition(form, *shapes),
            sharding_rule=lambda *_: (
                f"{', '.join(self.inputs)} -> {', '.join(self.results)}",
                {"need_replication_factors": self.replicated},
            ),
        )
        return partitioned

    def shard_form(self, form: Form, over: Mapping[str, Any]) -> Form:
        """Make the form that each device runs.

        Args:
          form: the operation.
          over: the mesh axes over which each axis is sharded: a name, a tuple of names or None.
        """
        del over
        return form

    def admit(self, over: dict[str, Any], mesh: Mesh, inputs: Sequence[Any]) -> dict[str, Any]:
        """Drop those of `over` that the operation cannot take with arrays of these shapes."""
        del mesh, inputs
        return over

    def _partition(self, form: Form, mesh: Mesh, inputs: Any, results: Any) -> Any:
        del results
        over: dict[str, Any] = {}
        taken: set[str] = set()
        for names, x in zip(self.inputs, inputs, strict=True):
            for name, size, axes in zip(names.split(), x.shape, x.sharding.spec, strict=False):
                mesh_axes = axis_names(axes)
                # A mesh axis shards one axis. Uneven shards are padded, with anything.
                shards = math.prod(mesh.shape[axis] for axis in mesh_axes)
                free = name not in self.replicated and name not in over
                if mesh_axes and free and size % shards == 0 and taken.isdisjoint(mesh_axes):
                    over[name] = axes
                    taken.update(mesh_axes)
        over = self.admit(over, mesh, inputs)

        def shardings(arrays: Sequence[str]) -> list[NamedSharding]:
            return [NamedSharding(mesh, P(*map(over.get, names.split()))) for names in arrays]

        return (
            mesh,
            self.shard_form(form, over),
            shardings(self.results),
            tuple(shardings(self.inputs)),
        )
