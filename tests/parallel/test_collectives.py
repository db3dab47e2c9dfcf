"""Collectives on a mesh, and without one, where they do nothing."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from meshes import mesh_of

from simplernn_jax.ops.primitive import vary_like
from simplernn_jax.parallel.collectives import (
    all_gather,
    axis_index,
    axis_size,
    broadcast_from_last,
    psum,
    remat_if_fsdp,
    shift,
)

SHARDED = P("sequence")


def on_four(function, *arguments, out=SHARDED):
    run = jax.shard_map(function, mesh=mesh_of(sequence=4), in_specs=SHARDED, out_specs=out)
    return jax.jit(run)(*arguments)


def everything(x):
    assert axis_size("data") == axis_size("no such axis") == 1
    return {
        "sum": psum(x, "data", "sequence"),
        "last": broadcast_from_last(x, "sequence"),
        "sum of copies": psum(jnp.ones(()), "sequence"),
        "index": x + jnp.asarray(axis_index("sequence"), x.dtype),
        "varying": vary_like(jnp.ones(x.shape), x) * x,
    }


def test_without_a_mesh():
    x = jnp.arange(8.0)
    result = everything(x)
    expected = {"sum": x, "last": x, "sum of copies": jnp.ones(()), "index": x, "varying": x}
    chex.assert_trees_all_equal(result, expected)
    assert all_gather(x, "fsdp", 0, after=x) is x
    assert remat_if_fsdp(everything) is everything


def test_on_a_mesh():
    x = jnp.arange(8.0)
    out = {"sum": P(), "last": P(), "sum of copies": P(), "index": SHARDED, "varying": SHARDED}
    result = on_four(everything, x, out=out)
    np.testing.assert_array_equal(result["sum"], [0 + 2 + 4 + 6, 1 + 3 + 5 + 7])
    np.testing.assert_array_equal(result["last"], [6, 7])
    assert float(result["sum of copies"]) == 4
    np.testing.assert_array_equal(result["index"], np.asarray(x) + np.repeat(np.arange(4), 2))
    np.testing.assert_array_equal(result["varying"], x)


def test_shift_fills_with_zeros():
    x = jnp.arange(1, 9)
    np.testing.assert_array_equal(
        on_four(lambda x: shift(x, "sequence"), x), [0, 0, 1, 2, 3, 4, 5, 6]
    )
    np.testing.assert_array_equal(
        on_four(lambda x: shift(x, "sequence", 3), x), [0, 0, 0, 0, 0, 0, 1, 2]
    )


def test_all_gather_and_its_gradient():
    mesh = mesh_of(fsdp=4)
    columns = P(None, "fsdp")

    def total(shard, x):
        def squares(shard, x):
            return (x @ all_gather(shard, "fsdp", 1, after=x)) ** 2

        return psum(jnp.sum(remat_if_fsdp(squares)(shard, x)), "fsdp")

    weights, x = jnp.arange(24.0).reshape(3, 8) / 10, jnp.arange(12.0).reshape(4, 3)
    run = jax.shard_map(total, mesh=mesh, in_specs=(columns, P("fsdp")), out_specs=P())
    ours = jax.jit(jax.value_and_grad(run))(weights, x)
    expected = jax.value_and_grad(lambda weights: jnp.sum((x @ weights) ** 2))(weights)
    chex.assert_trees_all_close(ours, expected, rtol=1e-6)
