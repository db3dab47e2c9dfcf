"""Partition specs of every array of a training state."""

import jax
import pytest
from jax.sharding import PartitionSpec as P
from meshes import mesh_of
from small_runs import small_config

from simplernn_jax.array_types import LogicalAxes
from simplernn_jax.parallel.mesh import partition_spec
from simplernn_jax.parallel.named_leaves import named_leaves
from simplernn_jax.training.optimizer import make_optimizer
from simplernn_jax.training.train_step import init_train_state, state_specs

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
    for name in ("query", "key", "value", "output_gate"):
        assert specs[f"{layer}/{name}_proj/kernel/value"] == COLUMNS
    assert specs[f"{layer}/out_proj/kernel/value"] == ROWS
    for name in ("keys", "values"):
        assert specs[f"carried/0/mixer/{name}"] == P(rows, "tensor")
    assert specs["carried/0/mixer/length"] == P(rows)


@pytest.mark.parametrize("block", ["plain", "residual"])
def test_axes_of_one_device_are_not_named(block):
    specs = specs_by_name(mesh_of(data=2, sequence=2), block)
    named = {spec for name, spec in specs.items() if not name.startswith("carried")}
    assert all(set(spec) <= {None} for spec in named)
    carried = {spec[0] for name, spec in specs.items() if name.startswith("carried")}
    assert carried == {"data"}


def test_an_unknown_logical_axis_is_an_error():
    with pytest.raises(ValueError, match=r"logical axis 'embd': .*'batch', 'time', 'embed', "):
        partition_spec(LogicalAxes(None, "embd"), mesh_of(data=2))
