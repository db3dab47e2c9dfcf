"""What devices tell each other: nothing where an axis is not there, the right parts where it is."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from meshes import mesh_of

from simplernn_jax.ops.collectives import (
    all_gather,
    axis_index,
    axis_size,
    broadcast_from_last,
    psum,
    remat_all_gather,
    shift,
    vary_like,
)

PARTS = P("sequence")


def on_four(function, *arguments, out=PARTS):
    run = jax.shard_map(function, mesh=mesh_of(sequence=4), in_specs=PARTS, out_specs=out)
    return jax.jit(run)(*arguments)


def everything(x):
    assert axis_size("data") == axis_size("no such axis") == 1
    return {
        "sum": psum(x, "data", "sequence"),
        "last": broadcast_from_last(x, "sequence"),
        "sum of copies": psum(jnp.ones(()), "sequence"),
        "index": x + axis_index("sequence"),
        "varying": vary_like(jnp.ones(x.shape), x) * x,
    }


def test_outside_of_a_mesh_nothing_happens():
    x = jnp.arange(8.0)
    result = everything(x)
    expected = {"sum": x, "last": x, "sum of copies": jnp.ones(()), "index": x, "varying": x}
    chex.assert_trees_all_equal(result, expected)
    assert all_gather(x, "fsdp", 0, after=x) is x
    assert remat_all_gather(everything) is everything


def test_on_a_mesh_each_device_has_its_part():
    x = jnp.arange(8.0)
    out = {"sum": P(), "last": P(), "sum of copies": P(), "index": PARTS, "varying": PARTS}
    result = on_four(everything, x, out=out)
    np.testing.assert_array_equal(result["sum"], [0 + 2 + 4 + 6, 1 + 3 + 5 + 7])
    np.testing.assert_array_equal(result["last"], [6, 7])
    assert float(result["sum of copies"]) == 4
    np.testing.assert_array_equal(result["index"], x + np.repeat(np.arange(4), 2))
    np.testing.assert_array_equal(result["varying"], x)


def test_shift_brings_what_lies_before_and_zeros_where_nothing_does():
    x = jnp.arange(1, 9)
    np.testing.assert_array_equal(
        on_four(lambda x: shift(x, "sequence"), x), [0, 0, 1, 2, 3, 4, 5, 6]
    )
    np.testing.assert_array_equal(
        on_four(lambda x: shift(x, "sequence", 3), x), [0, 0, 0, 0, 0, 0, 1, 2]
    )


def test_gather_puts_parts_together_and_takes_gradients_apart():
    mesh = mesh_of(fsdp=4)
    part = P(None, "fsdp")

    def total(part, x):
        def squares(part, x):
            return (x @ all_gather(part, "fsdp", 1, after=x)) ** 2

        return psum(jnp.sum(remat_all_gather(squares)(part, x)), "fsdp")

    weights, x = jnp.arange(24.0).reshape(3, 8) / 10, jnp.arange(12.0).reshape(4, 3)
    run = jax.shard_map(total, mesh=mesh, in_specs=(part, P("fsdp")), out_specs=P())
    ours = jax.jit(jax.value_and_grad(run))(weights, x)
    expected = jax.value_and_grad(lambda weights: jnp.sum((x @ weights) ** 2))(weights)
    chex.assert_trees_all_close(ours, expected, rtol=1e-6)
