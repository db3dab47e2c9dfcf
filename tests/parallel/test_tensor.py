"""Ids outside of the vocabulary, and the loss on a sharded one against optax."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from small_runs import mesh_of

from simplernn_jax.parallel.tensor import cross_entropy, lookup

BATCH, LENGTH, IDS = 4, 3, 20


@pytest.mark.parametrize("dtype", ["int32", "int8"])
def test_lookup_of_ids_outside_of_the_vocabulary_is_nan(dtype):
    table = jnp.ones((200, 6))  # 200 is no int8
    ids = jnp.asarray([[-1, 3, -128]], dtype)
    ids = ids if dtype == "int8" else ids.at[0, 2].set(200)
    found = np.isnan(jax.jit(lookup)(table, ids)).all(axis=-1)
    np.testing.assert_array_equal(found, [[True, False, True]])


def test_cross_entropy_and_its_gradient():
    random = np.random.default_rng(0)
    targets = jnp.asarray(random.integers(0, IDS, (BATCH, LENGTH)), jnp.int32)
    targets = targets.at[0, 0].set(0).at[1, 1].set(IDS - 1)
    logits = random.normal(size=(BATCH, LENGTH, IDS)).astype(np.float32)
    logits[1] *= 1e4  # their exponentials overflow unless the maximum is subtracted
    logits[2] -= 1e4
    weights = random.normal(size=(BATCH, LENGTH)).astype(np.float32)

    def losses_and_gradient(function):
        losses, pullback = jax.vjp(lambda logits: function(logits, targets), jnp.asarray(logits))
        return losses, *pullback(jnp.asarray(weights))

    sharded = jax.shard_map(
        cross_entropy,
        mesh=mesh_of(fsdp=2, tensor=4),
        in_specs=(P("fsdp", None, "tensor"), P("fsdp")),
        out_specs=P("fsdp"),
    )
    ours = losses_and_gradient(jax.jit(sharded))
    expected = losses_and_gradient(optax.softmax_cross_entropy_with_integer_labels)
    assert np.isfinite(ours[0]).all()
    chex.assert_trees_all_close(ours, expected, rtol=1e-5, atol=1e-5)
