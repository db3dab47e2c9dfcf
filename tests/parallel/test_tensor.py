"""Embedding and loss on a sharded vocabulary, against the same on one device."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from small_runs import mesh_of

from simplernn_jax.parallel.tensor import cross_entropy, lookup

IDS, WIDTH, BATCH, LENGTH = 20, 6, 4, 3
MESH = mesh_of(fsdp=2, tensor=4)
TABLE, TOKENS = P("tensor", "fsdp"), P("fsdp")


def draw():
    random = np.random.default_rng(0)
    table = jnp.asarray(random.normal(size=(IDS, WIDTH)), jnp.float32)
    tokens = jnp.asarray(random.integers(0, IDS, (BATCH, LENGTH)), jnp.int32)
    return table, tokens.at[0, 0].set(0).at[1, 1].set(IDS - 1)


def sharded_and_expected(function, reference, specs, out_spec, *arguments):
    """Values and gradients on the mesh, and those of a reference on one device."""
    sharded = jax.shard_map(function, mesh=MESH, in_specs=specs, out_specs=out_spec)
    return [value_and_gradients(run, *arguments) for run in (sharded, reference)]


def value_and_gradients(run, *arguments):
    """Differentiate with a cotangent that differs per entry."""

    def total(*arguments):
        result = run(*arguments)
        places = jnp.arange(result.size, dtype=result.dtype)
        return jnp.sum(jnp.sin(result + places.reshape(result.shape))), result

    floats = [n for n, x in enumerate(arguments) if jnp.issubdtype(x.dtype, jnp.floating)]
    gradients, result = jax.jit(jax.grad(total, floats, has_aux=True))(*arguments)
    return result, gradients


def test_lookup_and_its_gradient():
    table, tokens = draw()
    ours, expected = sharded_and_expected(
        lookup, lambda table, tokens: table[tokens], (TABLE, TOKENS), TOKENS, table, tokens
    )
    chex.assert_trees_all_close(ours, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(ours[0], expected[0])


@pytest.mark.parametrize("dtype", ["int32", "int8"])
def test_lookup_of_ids_outside_of_the_vocabulary_is_nan(dtype):
    table = jnp.ones((200, WIDTH))  # 200 is no int8
    ids = jnp.asarray([[-1, 3, -128]], dtype)
    ids = ids if dtype == "int8" else ids.at[0, 2].set(200)
    found = np.isnan(jax.jit(lookup)(table, ids)).all(axis=-1)
    np.testing.assert_array_equal(found, [[True, False, True]])


def test_cross_entropy_and_its_gradient():
    _, targets = draw()
    logits = np.random.default_rng(1).normal(size=(BATCH, LENGTH, IDS)).astype(np.float32)
    logits[1] *= 1e4  # their exponentials overflow unless the maximum is subtracted
    logits[2] -= 1e4
    reference = optax.softmax_cross_entropy_with_integer_labels
    specs = (P("fsdp", None, "tensor"), TOKENS)
    ours, expected = sharded_and_expected(
        cross_entropy, reference, specs, TOKENS, jnp.asarray(logits), targets
    )
    assert np.isfinite(ours[0]).all()
    chex.assert_trees_all_close(ours[0], expected[0], rtol=1e-5, atol=1e-5)
    # The cotangent is the cosine of the loss, where rounding of large values matters.
    small = jnp.array([0, 3])
    chex.assert_trees_all_close(ours[1][0][small], expected[1][0][small], rtol=1e-4, atol=1e-6)
