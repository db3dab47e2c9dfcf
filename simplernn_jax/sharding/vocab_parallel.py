"""Embedding, head and loss on a vocabulary that lies apart over the mesh axis ``tensor``.

Device i of n holds rows i N/n to (i+1) N/n of the embedding, and the logits of the same ids. All
logits are never in one place: a softmax needs only their largest value and a sum.
"""

from typing import Any

import jax
import jax.numpy as jnp

from simplernn_jax.array_types import Logits, Tokens
from simplernn_jax.ops.matmul import matmul
from simplernn_jax.sharding.collectives import axis_index, gather, psum, remat_all_gather


def lookup(table: jax.Array, tokens: Tokens) -> jax.Array:
    """Rows of an embedding, ``[..., D]``.

    Args:
      table: this device's part, ``[N / tensor, D / fsdp]``.
      tokens: ids in ``[0, N)``; others give zeros.
    """

    def own_rows(table: jax.Array, tokens: jax.Array) -> jax.Array:
        whole = gather(table, "fsdp", 1, after=tokens)
        rows, is_own = _own(tokens, table.shape[0])
        return jnp.where(is_own[..., None], jnp.take(whole, rows, axis=0, mode="clip"), 0)

    return psum(remat_all_gather(own_rows)(table, tokens), "tensor")


def tied_logits(hidden: jax.Array, table: jax.Array, dtype: Any) -> jax.Array:
    """Logits of this device's ids, ``[tokens, N / tensor]`` in float32 at least.

    Args:
      hidden: ``[tokens, D]``.
      table: this device's part of the embedding, ``[N / tensor, D / fsdp]``.
      dtype: of the product's operands.
    """

    def whole_product(hidden: jax.Array, table: jax.Array) -> jax.Array:
        return matmul(hidden, gather(table, "fsdp", 1, after=hidden).T, dtype)

    return remat_all_gather(whole_product)(hidden, table)


def cross_entropy(logits: Logits, targets: Tokens) -> jax.Array:
    """-log softmax(logits)[target] of each position, ``[B, T]``, in nats.

    Args:
      logits: of this device's ids, ``[B, T, N / tensor]``.
      targets: ids in ``[0, N)``.
    """
    largest = jnp.max(jax.lax.stop_gradient(logits), axis=-1)
    largest = jax.lax.pmax(largest, "tensor")
    total = jnp.sum(jnp.exp(logits - largest[..., None]), axis=-1)
    column, is_own = _own(targets, logits.shape[-1])
    chosen = jnp.take_along_axis(logits, column[..., None], axis=-1, mode="clip")[..., 0]
    total, chosen = psum((total, jnp.where(is_own, chosen, 0)), "tensor")
    return jnp.log(total) + largest - chosen


def _own(ids: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """Where the ids lie in this device's part, and whether they do."""
    row = ids - axis_index("tensor") * size
    return row, (row >= 0) & (row < size)
