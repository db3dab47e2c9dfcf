"""Sharded arrays made of local sequences and copied back, with the devices of one process."""

import chex
import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from simplernn_jax.config import MeshConfig
from simplernn_jax.parallel.mesh import BATCH_AXES, make_mesh
from simplernn_jax.parallel.shardings import global_arrays_from_local, local_copy, process_slice

EIGHT = jax.devices("cpu")


@pytest.fixture
def mesh():
    return make_mesh(MeshConfig(data=2, fsdp=2, sequence=2), EIGHT)


def test_every_device_holds_its_shard(mesh):
    tokens = np.arange(12 * 6, dtype=np.int32).reshape(12, 6)
    reset = np.arange(12) % 5 == 0
    shardings = (
        NamedSharding(mesh, PartitionSpec(BATCH_AXES, "sequence")),
        NamedSharding(mesh, PartitionSpec(BATCH_AXES)),
    )
    arrays = global_arrays_from_local((tokens, reset), shardings, 0, 12)
    for whole, array, sharding in zip((tokens, reset), arrays, shardings, strict=True):
        assert array.sharding == sharding
        assert array.dtype == whole.dtype
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(shard.data, whole[shard.index])
    assert arrays[0].addressable_shards[0].data.shape == (3, 3)
    assert arrays[1].addressable_shards[0].data.shape == (3,)


def test_sequences_of_a_process_are_those_of_its_devices(mesh):
    rows = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    assert process_slice(rows, 12) == slice(0, 12)
    assert process_slice(NamedSharding(mesh, PartitionSpec()), 12) == slice(0, 12)


def test_a_local_copy_is_unsharded_and_on_one_device(mesh):
    kernel = np.arange(35.0, dtype=np.float32).reshape(7, 5)
    spread = {
        "kernel": jax.device_put(
            kernel[:6, :4], NamedSharding(mesh, PartitionSpec("fsdp", "data"))
        ),
        "bias": jax.device_put(kernel[6], NamedSharding(mesh, PartitionSpec())),
    }
    copy = local_copy(spread)
    assert {len(leaf.sharding.device_set) for leaf in copy.values()} == {1}
    chex.assert_trees_all_equal(copy, {"kernel": kernel[:6, :4], "bias": kernel[6]})
