"""Names of the mesh axes, and the rules that map logical axes of arrays to them.

Parameters and states name their logical axes where they are created. Axes named None are
replicated.
"""

from jax.sharding import Mesh, PartitionSpec

from simplernn_jax.array_types import LogicalAxes

AXES = ("data", "fsdp", "tensor", "sequence", "stage")
"""Mesh axes, from the slowest link to the fastest except `stage`; see `MeshConfig`."""

BATCH_AXES = ("data", "fsdp")
"""Axes over which the sequences of a batch are sharded."""

TOKEN_AXES = (*BATCH_AXES, "sequence", "stage")
"""Axes whose devices take the loss of different tokens: losses and gradients are sums over them."""

LOGICAL_AXIS_RULES: dict[str, str | tuple[str, ...]] = {
    "batch": BATCH_AXES,
    "time": "sequence",
    "embed": "fsdp",
    "rank": "fsdp",
    "heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "layers": "stage",
}


def partition_spec(axes: LogicalAxes, mesh: Mesh) -> PartitionSpec:
    """Map logical axes to axes of `mesh` with several devices; ValueError for an unknown name."""
    for axis in {*axes} - {None, *LOGICAL_AXIS_RULES}:
        raise ValueError(f"logical axis {axis!r}: must be None or one of {[*LOGICAL_AXIS_RULES]}")
    mapped = (axis and LOGICAL_AXIS_RULES[axis] for axis in axes)
    return drop_trivial_axes(PartitionSpec(*mapped), mesh)


def drop_trivial_axes(spec: PartitionSpec, mesh: Mesh) -> PartitionSpec:
    """Leave the mesh axes of one device out of `spec`."""

    def keep(names: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        if names is None or isinstance(names, str):
            return names if names and mesh.shape[names] > 1 else None
        return tuple(name for name in names if mesh.shape[name] > 1) or None

    return PartitionSpec(*map(keep, spec))
