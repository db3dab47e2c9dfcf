"""How programs and arrays come onto a mesh. On one device everything is left as it is."""

from typing import Any, TypeGuard

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from simplernn_jax.data.batches import Batch
from simplernn_jax.sharding.mesh import BATCH_AXES
from simplernn_jax.sharding.partition_specs import drop_trivial_axes


def is_distributed(mesh: Mesh | None) -> TypeGuard[Mesh]:
    """Whether several devices share the work."""
    return mesh is not None and mesh.size > 1


def compiler_options(mesh: Mesh | None) -> dict[str, str]:
    """What keeps computing something again from becoming keeping it.

    The compiler of jax 0.10 for CPUs takes away the barriers of `jax.checkpoint` before it looks
    for equal expressions a last time, and then finds parameters gathered twice.
    """
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    on_cpu = device.platform == "cpu"
    return {"xla_disable_hlo_passes": "cse_barrier_expander"} if on_cpu else {}


def batch_specs(mesh: Mesh) -> Batch:
    """Rows lie apart along ``data`` and ``fsdp``, time along ``sequence``.

    Along ``stage`` only what the loss needs lies apart: every stage sees all tokens, and takes
    the loss of its share.
    """
    rows: Any = drop_trivial_axes(PartitionSpec(BATCH_AXES), mesh)
    tokens: Any = drop_trivial_axes(PartitionSpec(BATCH_AXES, "sequence"), mesh)
    of_loss: Any = drop_trivial_axes(PartitionSpec(BATCH_AXES, ("sequence", "stage")), mesh)
    return Batch(tokens, of_loss, of_loss, tokens, reset=rows)


def window_specs(mesh: Mesh) -> Batch:
    """Of what `windows_of` makes of a batch: the time of each window lies apart, not of rows."""
    specs: Any = batch_specs(mesh)
    of_tokens: Any = [PartitionSpec(spec[0], None, spec[1]) for spec in specs[:4]]
    return Batch._make([*of_tokens, specs.reset])


def batch_shardings(mesh: Mesh) -> Batch | None:
    """Where the arrays of a batch lie; None on one device."""
    return shardings_of(batch_specs(mesh), mesh) if is_distributed(mesh) else None


def shardings_of(specs: Any, mesh: Mesh) -> Any:
    """`NamedSharding` for each `PartitionSpec` of a tree."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
