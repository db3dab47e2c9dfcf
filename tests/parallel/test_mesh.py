"""The mesh of a configuration: its axes and its errors, which show the arithmetic."""

import jax
import pytest
from small_runs import small_config

from simplernn_jax.config import MeshConfig
from simplernn_jax.errors import UserError
from simplernn_jax.parallel.mesh import AXES, check_fits, describe, make_mesh

EIGHT = jax.devices("cpu")


def test_data_takes_the_remaining_devices():
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2), EIGHT)
    assert mesh.axis_names == AXES
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2, "sequence": 1, "pipeline": 1}


def test_a_mesh_is_described_by_its_axes():
    assert describe(make_mesh(MeshConfig(), EIGHT[:1])) == "cpu"
    assert describe(make_mesh(MeshConfig(fsdp=4), EIGHT)) == "8 x cpu (data 2, fsdp 4)"


def test_a_mesh_of_some_devices(caplog):
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
    config = small_config("residual", **fields)
    mesh = make_mesh(MeshConfig(**sizes), EIGHT)
    with pytest.raises(UserError, match=message):
        check_fits(config, mesh)
