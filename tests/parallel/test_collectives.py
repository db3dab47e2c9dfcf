"""Collectives on a mesh, and without one, where they do nothing."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from small_runs import mesh_of

from simplernn_jax.parallel.collectives import (
    all_gather,
    axis_index,
    axis_size,
    broadcast_from_last,
    psum,
    remat_if_fsdp,
    shift,
)


def test_without_a_mesh_they_do_nothing():
    x = jnp.arange(8.0)
    assert (axis_size("sequence"), axis_index("sequence")) == (1, 0)
    assert psum(x, "data", "sequence") is broadcast_from_last(x, "sequence") is x
    assert all_gather(x, "fsdp", 0, after=x) is x
    assert remat_if_fsdp(jnp.sin) is jnp.sin


def test_on_a_mesh():
    def everything(x):
        assert axis_size("data") == axis_size("no such axis") == 1
        return {
            "sum": psum(x, "data", "sequence"),
            "last": broadcast_from_last(x, "sequence"),
            "sum of copies": psum(jnp.ones(()), "sequence"),
            "index": x + jnp.asarray(axis_index("sequence"), x.dtype),
            "shifted": shift(x, "sequence"),
            "shifted by 3": shift(x, "sequence", 3),
        }

    x, sharded = jnp.arange(1, 9.0), P("sequence")
    out = dict.fromkeys(("sum", "last", "sum of copies"), P())
    out |= dict.fromkeys(("index", "shifted", "shifted by 3"), sharded)
    run = jax.shard_map(everything, mesh=mesh_of(sequence=4), in_specs=sharded, out_specs=out)
    expected = {
        "sum": [1 + 3 + 5 + 7, 2 + 4 + 6 + 8],
        "last": [7, 8],
        "sum of copies": 4,
        "index": [1, 2, 4, 5, 7, 8, 10, 11],
        "shifted": [0, 0, 1, 2, 3, 4, 5, 6],
        "shifted by 3": [0, 0, 0, 0, 0, 0, 1, 2],
    }
    for name, result in jax.jit(run)(x).items():
        np.testing.assert_array_equal(result, expected[name], err_msg=name)


def test_all_gather_and_its_gradient():
    columns = P(None, "fsdp")

    def total(shard, x):
        def squares(shard, x):
            return (x @ all_gather(shard, "fsdp", 1, after=x)) ** 2

        return psum(jnp.sum(remat_if_fsdp(squares)(shard, x)), "fsdp")

    weights, x = jnp.arange(24.0).reshape(3, 8) / 10, jnp.arange(12.0).reshape(4, 3)
    specs = (columns, P("fsdp"))
    run = jax.shard_map(total, mesh=mesh_of(fsdp=4), in_specs=specs, out_specs=P())
    ours = jax.jit(jax.value_and_grad(run))(weights, x)
    expected = jax.value_and_grad(lambda weights: jnp.sum((x @ weights) ** 2))(weights)
    chex.assert_trees_all_close(ours, expected, rtol=1e-6)
