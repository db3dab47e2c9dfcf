"""Reading a checkpoint back before it counts: what was written is what was to be saved."""

import dataclasses
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from simplernn_jax.checkpoint.contents import read_arrays, saved_leaves

_GROUP_BYTES = 1 << 28
"""Bytes of the arrays that are read back at a time, unless one alone has more."""


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """What an array holds, without its memory, which a training step may reuse."""

    shape: tuple[int, ...]
    dtype: np.dtype
    checksums: tuple[tuple[tuple[slice, ...], int], ...]
    """Index and CRC-32 of each shard on this process's devices, of copies only one."""


def fingerprints(leaves: Mapping[str, Any]) -> dict[str, Fingerprint]:
    """Fingerprints of arrays, by name; waits until they are computed."""
    return {name: _fingerprint(leaf) for name, leaf in leaves.items()}


def check_saved(path: str, expected: Mapping[str, Fingerprint]) -> None:
    """Compare the arrays of the checkpoint folder `path` with those that were to be saved.

    Of arrays that lie on several processes, only the shards of this one are compared.

    Raises:
      ValueError: names the first array that is missing or another one. Arrays that cannot be read
        raise what Orbax and TensorStore raise.
    """
    found = saved_leaves(path)
    for name, array in expected.items():
        if name not in found:
            raise ValueError(f"{name} is missing")
        if (tuple(found[name].shape), np.dtype(found[name].dtype)) != (array.shape, array.dtype):
            raise ValueError(f"{name} has another shape or dtype")
    for names in _groups(expected):
        arrays = read_arrays(path, names)
        for name in names:
            array = arrays.pop(name)
            for index, checksum in expected[name].checksums:
                if _checksum(array[index]) != checksum:
                    raise ValueError(f"{name} is not what was written")


def _fingerprint(leaf: Any) -> Fingerprint:
    if isinstance(leaf, jax.Array):
        shards = [shard for shard in leaf.addressable_shards if shard.replica_id == 0]
        parts = tuple((shard.index, _checksum(np.asarray(shard.data))) for shard in shards)
    else:
        parts = (((), _checksum(np.asarray(leaf))),)
    return Fingerprint(tuple(leaf.shape), np.dtype(leaf.dtype), parts)


def _checksum(array: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def _groups(expected: Mapping[str, Fingerprint]) -> Iterator[list[str]]:
    """Names of arrays to read together."""
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
