"""Embedding and loss on a vocabulary that may be sharded over the mesh axis ``tensor``.

Inside `jax.shard_map`, device i of n holds rows i N/n to (i+1) N/n of the embedding, and the logits
of the same ids. All logits are never on one device: a softmax needs only their largest value and a
sum (Megatron-LM, arXiv:1909.08053, section 3).
"""

import jax
import jax.numpy as jnp
import optax

from simplernn_jax.array_types import Logits, Tokens
from simplernn_jax.ops.collectives import all_gather, axis_index, axis_size, psum, remat_all_gather


def lookup(table: jax.Array, tokens: Tokens) -> jax.Array:
    """Rows of an embedding, ``[..., D]``.

    Args:
      table: this device's shard, ``[N / tensor, D / fsdp]``.
      tokens: ids in ``[0, N)``; others give NaN, or zeros if the vocabulary is sharded.
    """

    def own_rows(table: jax.Array, tokens: jax.Array) -> jax.Array:
        whole = all_gather(table, "fsdp", 1, after=tokens)
        if axis_size("tensor") == 1:
            return jnp.take(whole, tokens, axis=0)
        rows, is_own = _own(tokens, table.shape[0])
        return jnp.where(is_own[..., None], jnp.take(whole, rows, axis=0, mode="clip"), 0)

    return psum(remat_all_gather(own_rows)(table, tokens), "tensor")


def cross_entropy(logits: Logits, targets: Tokens) -> jax.Array:
    """-log softmax(logits)[target] of each position, ``[B, T]``, in nats.

    Args:
      logits: of this device's ids, ``[B, T, N / tensor]``.
      targets: ids in ``[0, N)``.
    """
    if axis_size("tensor") == 1:
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    largest = jnp.max(jax.lax.stop_gradient(logits), axis=-1)
    largest = jax.lax.pmax(largest, "tensor")
    total = jnp.sum(jnp.exp(logits - largest[..., None]), axis=-1)
    column, is_own = _own(targets, logits.shape[-1])
    chosen = jnp.take_along_axis(logits, column[..., None], axis=-1, mode="clip")[..., 0]
    total, chosen = psum((total, jnp.where(is_own, chosen, 0)), "tensor")
    return jnp.log(total) + largest - chosen


def _own(ids: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """Where the ids are in this device's shard, and whether they are."""
    row = ids - axis_index("tensor") * size
    return row, (row >= 0) & (row < size)
