"""How a program and what it works on come onto the mesh; with one device, nothing changes."""

from typing import Any

from jax.sharding import Mesh, PartitionSpec

from simplernn_jax.data.batches import Batch
from simplernn_jax.parallel.mesh import BATCH_AXES
from simplernn_jax.parallel.shardings import present


def batch_specs(mesh: Mesh) -> Batch:
    """Rows lie apart along ``data`` and ``fsdp``, time along ``sequence``.

    Along ``stage`` only what the loss needs lies apart: every stage sees all tokens, and takes
    the loss of its share.
    """
    rows = present(PartitionSpec(BATCH_AXES), mesh)
    tokens: Any = present(PartitionSpec(BATCH_AXES, "sequence"), mesh)
    of_loss: Any = present(PartitionSpec(BATCH_AXES, ("sequence", "stage")), mesh)
    return Batch(tokens, of_loss, of_loss, tokens, reset=rows)
