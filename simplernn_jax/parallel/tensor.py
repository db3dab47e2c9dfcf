"""Projections, embedding and loss with weights sharded over the mesh axes ``fsdp`` and ``tensor``.

Inside `jax.shard_map`, kernels are gathered over ``fsdp`` before use, forward and backward. Over
``tensor`` a projection is (Megatron-LM, arXiv:1909.08053, section 3)

- column parallel, ``[in / fsdp, out / tensor]``: each device computes its outputs from all inputs;
- row parallel, ``[in / tensor, out / fsdp]``: each device has its inputs, and the outputs are sums
  over the devices.

Device i of n holds the embeddings and logits of ids i N/n to (i+1) N/n. No device holds all logits:
a softmax needs only their maximum and a sum.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from simplernn_jax.array_types import Logits, Tokens
from simplernn_jax.ops.checks import INTEGER, accumulator_dtype, check_array
from simplernn_jax.ops.matmul import fused_matmul
from simplernn_jax.ops.primitive import vary_like
from simplernn_jax.parallel.collectives import (
    all_gather,
    axis_index,
    axis_size,
    psum,
    remat_if_fsdp,
)


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


def fused_projection(
    x: jax.Array,
    kernels: Sequence[jax.Array],
    dtype: Any,
    *,
    row_parallel: bool = False,
    squared_relu: bool = False,
) -> tuple[jax.Array, ...]:
    """Apply `fused_matmul` to sharded kernels; raises what it does.

    Args:
      x: ``[..., in]``, or this device's inputs ``[..., in / tensor]`` if `row_parallel`.
      kernels: this device's shards, all column parallel or all row parallel.
      dtype: dtype of the operands.
      row_parallel: sum the results over ``tensor``: they are ``[..., out]``, otherwise
        ``[..., out / tensor]``.
      squared_relu: see `fused_matmul`; only of column parallel kernels.
    """
    x = vary_like(x, *kernels)  # its gradient is summed over `tensor` once for all kernels

    def gather_and_multiply(x: jax.Array, kernels: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        whole = [all_gather(kernel, "fsdp", int(row_parallel), after=x) for kernel in kernels]
        return fused_matmul(x, whole, dtype, squared_relu=squared_relu)

    outputs = remat_if_fsdp(gather_and_multiply)(x, tuple(kernels))
    return psum(outputs, "tensor") if row_parallel else outputs


def add_bias(y: jax.Array, bias: jax.Array) -> jax.Array:
    """Add `bias` ``[D]``, or this device's shard of it, to `y` ``[..., D]``."""
    bias = vary_like(bias.astype(accumulator_dtype(y, bias)), y)
    for axis in range(1, y.ndim):
        # Outer products with ones: broadcasts whose transposes are matmuls. XLA's CPU backend would
        # fuse a sum with what computes its operand, and add in another order on one thread than on
        # several.
        ones = jnp.ones((*y.shape[:axis], 1), bias.dtype)
        bias = jnp.matmul(ones, bias[..., None, :], precision=jax.lax.Precision.HIGHEST)
    return y + bias
