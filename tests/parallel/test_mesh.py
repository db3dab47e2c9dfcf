"""The mesh of a configuration, its errors, which show the arithmetic, and shardings over it."""

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
from simplernn_jax.parallel.mesh import (
    AXES,
    BATCH_AXES,
    check_fits,
    describe,
    global_arrays_from_local,
    local_copy,
    make_mesh,
    partition_spec,
    process_slice,
)
from simplernn_jax.parallel.named_leaves import named_leaves
from simplernn_jax.training.optimizer import make_optimizer
from simplernn_jax.training.train_step import init_train_state, state_specs

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


ALL = {"data": 2, "fsdp": 2, "tensor": 2}
COLUMNS, ROWS = P("fsdp", "tensor"), P("tensor", "fsdp")


def specs_by_name(mesh, block="residual", **fields):
    config = small_config(block, mode="stream", **fields)
    optimizer = make_optimizer(config.optimizer, 10)
    state = jax.eval_shape(lambda: init_train_state(config, optimizer))
    specs = jax.tree.leaves(state_specs(config, optimizer, mesh))
    return dict(zip(named_leaves(state), specs, strict=True))


def test_every_array_of_a_residual_model():
    specs = specs_by_name(mesh_of(**ALL), tie_embeddings=False)
    columns = {"mlp_in"} | {
        f"mixer/cell/{name}_proj" for name in ("query", "key", "value", "gate", "output_gate")
    }
    layer = {f"{name}/kernel": COLUMNS for name in columns}
    layer |= {"mlp_out/kernel": ROWS, "mixer/cell/out_proj/kernel": ROWS}
    biases = ("mixer/cell/gate_proj/bias", "mixer/cell/key_proj/bias")
    layer |= {"convolution/weights": P()} | dict.fromkeys(biases, P("tensor"))
    params = {f"layers/0/{name}": spec for name, spec in layer.items()}
    params |= {"embedding/embedding": ROWS, "final_scale": P()}
    params |= {"head/kernel": COLUMNS, "head/bias": P("tensor")}
    expected = {f"params/{name}/value": spec for name, spec in params.items()}
    # The optimizer's moments are sharded as their parameters.
    for mean in ("mu", "nu"):
        expected |= {f"opt_state/1/0/{mean}/{name}/value": spec for name, spec in params.items()}
    expected |= {
        "carried/0/mixer": P(("data", "fsdp"), "tensor"),
        "carried/0/convolution": P(("data", "fsdp")),
    }
    scalars = ("step", "skipped_updates", "consecutive_skips", "rng")
    expected |= dict.fromkeys((*scalars, "opt_state/1/0/count", "opt_state/1/2/count"), P())
    assert specs == expected


def test_attention_and_its_cache_are_sharded_by_heads():
    specs = specs_by_name(mesh_of(**ALL), mixer="attention")
    layer, rows = "params/layers/0/mixer", ("data", "fsdp")
    assert specs[f"{layer}/query_proj/kernel/value"] == COLUMNS
    assert specs[f"{layer}/out_proj/kernel/value"] == ROWS
    for name in ("keys", "values"):
        assert specs[f"carried/0/mixer/{name}"] == P(rows, "tensor")
    assert specs["carried/0/mixer/length"] == P(rows)


def test_axes_of_one_device_are_not_named_and_unknown_axes_are_errors():
    specs = specs_by_name(mesh_of(data=2, sequence=2))
    named = {spec for name, spec in specs.items() if not name.startswith("carried")}
    assert all(set(spec) <= {None} for spec in named)
    assert {spec[0] for name, spec in specs.items() if name.startswith("carried")} == {"data"}
    with pytest.raises(ValueError, match=r"logical axis 'embd': .*'batch', 'time', 'embed', "):
        partition_spec(LogicalAxes(None, "embd"), mesh_of(data=2))


def test_every_device_holds_its_shard_of_local_sequences():
    mesh = mesh_of(data=2, fsdp=2, sequence=2)
    tokens = np.arange(12 * 6, dtype=np.int32).reshape(12, 6)
    reset = np.arange(12) % 5 == 0
    shardings = NamedSharding(mesh, P(BATCH_AXES, "sequence")), NamedSharding(mesh, P(BATCH_AXES))
    arrays = global_arrays_from_local((tokens, reset), shardings, 0, 12)
    for whole, array, sharding in zip((tokens, reset), arrays, shardings, strict=True):
        assert (array.sharding, array.dtype) == (sharding, whole.dtype)
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(shard.data, whole[shard.index])
    assert arrays[0].addressable_shards[0].data.shape == (3, 3)
    for sharding in (shardings[1], NamedSharding(mesh, P())):
        assert process_slice(sharding, 12) == slice(0, 12)


def test_a_local_copy_is_unsharded_and_on_one_device():
    mesh = mesh_of(data=2, fsdp=2)
    kernel = np.arange(24.0, dtype=np.float32).reshape(6, 4)
    spread = {"kernel": jax.device_put(kernel, NamedSharding(mesh, P("fsdp", "data")))}
    copy = local_copy(spread)
    assert len(copy["kernel"].sharding.device_set) == 1
    chex.assert_trees_all_equal(copy, {"kernel": kernel})
    assert local_copy(copy)["kernel"] is copy["kernel"]
