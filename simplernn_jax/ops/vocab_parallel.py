"""Embedding and loss on a vocabulary that may be sharded over the mesh axis ``tensor``.

Inside `jax.shard_map`, device i of n holds the embeddings and logits of ids i N/n to (i+1) N/n. No
device holds all logits: a softmax needs only their maximum and a sum (Megatron-LM,
arXiv:1909.08053, section 3).
"""

import jax
import jax.numpy as jnp
import optax

from simplernn_jax.array_types import Logits, Tokens
from simplernn_jax.ops.checks import INTEGER, check_array
from simplernn_jax.ops.collectives import all_gather, axis_index, axis_size, psum, remat_if_fsdp


def lookup(table: jax.Array, tokens: Tokens) -> jax.Array:
    """Look up embeddings, ``[..., D]`` of the table's dtype.

    Args:
      table: this device's shard, ``[N / tensor, D / fsdp]``.
      tokens: ``[...]`` in ``[0, N)``; others give NaN, or zeros if the vocabulary is sharded.
    """
    check_array("table", table, "N D")
    check_array("tokens", tokens, "...", INTEGER)

    def local_lookup(table: jax.Array, tokens: jax.Array) -> jax.Array:
        whole = all_gather(table, "fsdp", 1, after=tokens)
        if axis_size("tensor") == 1:
            # `take` would count negative ids from the end; small dtypes may not hold N.
            ids = tokens if tokens.dtype.itemsize >= 4 else tokens.astype(jnp.int32)
            return jnp.take(whole, jnp.where(ids < 0, table.shape[0], ids), axis=0)
        local, is_local = _local_ids(tokens, table.shape[0])
        return jnp.where(is_local[..., None], jnp.take(whole, local, axis=0, mode="clip"), 0)

    return psum(remat_if_fsdp(local_lookup)(table, tokens), "tensor")


def cross_entropy(logits: Logits, targets: Tokens) -> jax.Array:
    """Compute -log softmax(logits)[target] per position, ``[B, T]`` in nats, dtype of `logits`.

    Args:
      logits: this device's shard, ``[B, T, N / tensor]``.
      targets: ids ``[B, T]`` in ``[0, N)``.
    """
    check_array("logits", logits, "... N")
    check_array("targets", targets, "...", INTEGER)
    if axis_size("tensor") == 1:
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    largest = jnp.max(jax.lax.stop_gradient(logits), axis=-1)
    largest = jax.lax.pmax(largest, "tensor")
    total = jnp.sum(jnp.exp(logits - largest[..., None]), axis=-1)
    local, is_local = _local_ids(targets, logits.shape[-1])
    chosen = jnp.take_along_axis(logits, local[..., None], axis=-1, mode="clip")[..., 0]
    total, chosen = psum((total, jnp.where(is_local, chosen, 0)), "tensor")
    return jnp.log(total) + largest - chosen


def _local_ids(ids: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """Index the ids in this device's shard, and mark those that are in it."""
    local = ids - axis_index("tensor") * size
    return local, (local >= 0) & (local < size)
