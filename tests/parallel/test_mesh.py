"""The mesh of a configuration, its errors, which show the arithmetic, and shardings over it."""

import math

import chex
import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from small_runs import mesh_of, small_config

from simplernn_jax.array_types import LogicalAxes
from simplernn_jax.config import MeshConfig
from simplernn_jax.errors import UserError
from simplernn_jax.parallel.mesh import check_fits, describe, local_copy, make_mesh, partition_spec
from simplernn_jax.parallel.named_leaves import named_leaves
from simplernn_jax.training.optimizer import make_optimizer
from simplernn_jax.training.train_step import init_train_state, state_specs

EIGHT = jax.devices("cpu")


def test_data_takes_the_remaining_devices_unless_its_size_is_given(caplog):
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2), EIGHT)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2, "sequence": 1, "pipeline": 1}
    assert describe(mesh) == "8 x cpu (data 2, fsdp 2, tensor 2)"
    assert describe(make_mesh(MeshConfig(), EIGHT[:1])) == "cpu"
    mesh = make_mesh(MeshConfig(data=2, sequence=2), EIGHT)
    assert mesh.devices.ravel().tolist() == EIGHT[:4]
    assert "uses 4 of 8 devices" in caplog.text


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 3}, r"data 3 \* fsdp 1 .* = 3 devices, and this run has 8"),
        ({"pipeline": 16}, r"pipeline 16 = 16 devices, and this run has 8"),
    ],
)
def test_sizes_that_do_not_make_up_the_devices(sizes, message):
    with pytest.raises(UserError, match=message):
        make_mesh(MeshConfig(**sizes), EIGHT)


@pytest.mark.parametrize(
    ("sizes", "fields", "message"),
    [
        ({}, {"batch_size": 12}, r"batch_size=12 .* data 8 \* fsdp 1: 12 / 8 leaves 4"),
        (
            {"data": 2, "fsdp": 4},
            {"batch_size": 16, "gradient_accumulation": 4},
            r"data 2 \* fsdp 4 \* gradient_accumulation 4: 16 / 32 leaves 16",
        ),
        (
            {"sequence": 8},
            {"sequence_length": 16, "bptt_window": 4},
            r"train.bptt_window=4 .* 4 / 8 leaves 4",
        ),
        ({"tensor": 8}, {"key_dim": 24, "value_dim": 24, "num_heads": 3}, r"num_heads=3"),
        ({"fsdp": 8}, {"batch_size": 8, "hidden_dim": 12}, r"hidden_dim=12 .* leaves 4"),
        ({"pipeline": 4}, {"num_layers": 4}, r"sequence_length=7 .* pipeline 4: 7 / 4 leaves 3"),
        (
            {"sequence": 8},
            {"sequence_length": 16},
            r"sequence_length=16 leaves each device of sequence 8 a shard of 2, .* needs 3 ",
        ),
        (
            {"pipeline": 4},
            {"num_layers": 4, "sequence_length": 8, "mixer": ["simple_rnn"] * 3 + ["attention"]},
            r"model.mixer='.*attention' .* pipeline 4: .* are 3 of simple_rnn, 1 of attention; ",
        ),
    ],
)
def test_sizes_that_do_not_divide_are_refused(sizes, fields, message):
    config = small_config("parallel", **fields)
    mesh = make_mesh(MeshConfig(**sizes), EIGHT)
    with pytest.raises(UserError, match=message):
        check_fits(config, mesh)


@pytest.mark.parametrize("mixer", ["simple_rnn", "attention"])
def test_a_device_holds_its_share_of_every_array(mixer):
    mesh = mesh_of(data=2, fsdp=2, tensor=2)
    config = small_config("parallel", mode="stream", tie_embeddings=False, mixer=mixer)
    optimizer = make_optimizer(config.optimizer, 10)
    state = jax.eval_shape(lambda: init_train_state(config, optimizer))
    specs = jax.tree.leaves(state_specs(config, optimizer, mesh))
    carried = {"convolution": 4, "mixer": 8, "keys": 8, "values": 8, "length": 4}
    for (name, leaf), spec in zip(named_leaves(state).items(), specs, strict=True):
        part = NamedSharding(mesh, spec).shard_shape((16,) * leaf.ndim)
        share = 16**leaf.ndim // math.prod(part)
        if name.startswith("carried"):
            assert share == carried[name.split("/")[-1]], name
        elif "kernel" in name or "embedding" in name:  # also of the optimizer's moments
            assert share == 4, name


def test_unknown_axes_are_errors():
    with pytest.raises(ValueError, match=r"logical axis 'embd': .*'batch', 'time', 'embed', "):
        partition_spec(LogicalAxes(None, "embd"), mesh_of(data=2))


def test_a_local_copy_is_unsharded_and_on_one_device():
    mesh = mesh_of(data=2, fsdp=2)
    kernel = np.arange(24.0, dtype=np.float32).reshape(6, 4)
    spread = {"kernel": jax.device_put(kernel, NamedSharding(mesh, P("fsdp", "data")))}
    copy = local_copy(spread)
    assert len(copy["kernel"].sharding.device_set) == 1
    chex.assert_trees_all_equal(copy, {"kernel": kernel})
    assert local_copy(copy)["kernel"] is copy["kernel"]
