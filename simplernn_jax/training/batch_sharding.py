"""Shardings of batches."""

from typing import Any

from jax.sharding import Mesh, PartitionSpec

from simplernn_jax.array_types import LogicalAxes
from simplernn_jax.data.batches import Batch
from simplernn_jax.parallel.mesh import BATCH_AXES, drop_trivial_axes, partition_spec
from simplernn_jax.parallel.shardings import is_distributed, named_shardings


def batch_specs(mesh: Mesh) -> Batch:
    """Return the `PartitionSpec` of each array of a batch.

    Sequences are sharded over ``data`` and ``fsdp``, their tokens over ``sequence``. Every stage
    sees all tokens, and computes the loss of its time shard: only what the loss needs is sharded
    over ``pipeline``.
    """
    sequences: Any = partition_spec(LogicalAxes("batch"), mesh)
    tokens: Any = partition_spec(LogicalAxes("batch", "time"), mesh)
    loss_tokens: Any = drop_trivial_axes(PartitionSpec(BATCH_AXES, ("sequence", "pipeline")), mesh)
    return Batch(tokens, loss_tokens, loss_tokens, tokens, reset=sequences)


def window_specs(mesh: Mesh) -> Batch:
    """Return `batch_specs` of `split_into_windows`: each window's tokens are sharded."""
    specs: Any = batch_specs(mesh)
    token_specs: Any = [PartitionSpec(spec[0], None, spec[1]) for spec in specs[:4]]
    return Batch._make([*token_specs, specs.reset])


def batch_shardings(mesh: Mesh) -> Batch | None:
    """Return the shardings of a batch's arrays; None on one device."""
    return named_shardings(batch_specs(mesh), mesh) if is_distributed(mesh) else None
