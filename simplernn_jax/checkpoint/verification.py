"""Read-back verification: a checkpoint is complete only if it holds what was to be saved."""

import dataclasses
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from simplernn_jax.checkpoint.contents import read_back
from simplernn_jax.parallel.distributed import barrier, is_coordinator

_GROUP_BYTES = 1 << 28
"""Bytes of arrays read back at a time, unless one alone has more."""


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """Checksums of an array, whose memory a training step may reuse."""

    shape: tuple[int, ...]
    dtype: np.dtype
    checksums: tuple[tuple[tuple[slice, ...], int], ...]
    """Index and CRC-32 of each shard, on the devices of all processes; of replicas only one."""


def fingerprints(leaves: Mapping[str, Any]) -> dict[str, Fingerprint]:
    """Return fingerprints of arrays by name; waits until the arrays are computed.

    All processes call it, each with its shards of the same arrays.
    """
    shards = {name: _shards(leaf) for name, leaf in leaves.items()}
    checksums = np.array(
        [
            0 if data is None else _crc32(np.asarray(data))
            for parts in shards.values()
            for _, data in parts
        ],
        np.uint32,
    )
    if jax.process_count() > 1:
        barrier("checksums")
        checksums = multihost_utils.process_allgather(checksums).sum(0)  # one is not 0
    values = iter(checksums.tolist())
    return {
        name: Fingerprint(
            tuple(leaf.shape),
            np.dtype(leaf.dtype),
            tuple((index, next(values)) for index, _ in shards[name]),
        )
        for name, leaf in leaves.items()
    }


def check_saved(path: str, expected: Mapping[str, Fingerprint]) -> None:
    """Compare the arrays of the checkpoint folder `path` with those that were to be saved.

    Raises:
      ValueError: names the first array that is missing or differs. Arrays that cannot be read
        raise the errors of Orbax and TensorStore.
    """
    for names in _groups(expected):
        arrays = read_back(path, names)
        for name in names:
            array = arrays.pop(name)
            if array is None:
                raise ValueError(f"{name} is missing")
            if (array.shape, array.dtype) != (expected[name].shape, expected[name].dtype):
                raise ValueError(f"{name} has a different shape or dtype")
            for index, checksum in expected[name].checksums:
                if _crc32(array[index]) != checksum:
                    raise ValueError(f"{name} is not what was written")


def _shards(leaf: Any) -> list[tuple[tuple[slice, ...], Any]]:
    """Return index and data of each shard, in the same order in every process.

    The data is None where another process has it.
    """
    if not isinstance(leaf, jax.Array):
        return [((), leaf if is_coordinator() else None)]
    shards = [shard for shard in leaf.global_shards if shard.replica_id == 0]
    return [(shard.index, shard.data) for shard in sorted(shards, key=lambda one: one.device.id)]


def _crc32(array: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def _groups(expected: Mapping[str, Fingerprint]) -> Iterator[list[str]]:
    """Split the names of the arrays into groups that are read together."""
    group: list[str] = []
    size = 0
    for name, array in expected.items():
        num_bytes = int(np.prod(array.shape, dtype=np.int64)) * array.dtype.itemsize
        if group and size + num_bytes > _GROUP_BYTES:
            yield group
            group, size = [], 0
        group.append(name)
        size += num_bytes
    if group:
        yield group
