"""Projections whose kernels may be sharded over the mesh axes ``fsdp`` and ``tensor``.

Inside `jax.shard_map`, kernels are gathered over ``fsdp`` before use, forward and backward. Over
``tensor`` a projection is (Megatron-LM, arXiv:1909.08053, section 3)

- column parallel, ``[in / fsdp, out / tensor]``: each device computes its outputs from all inputs;
- row parallel, ``[in / tensor, out / fsdp]``: each device has its inputs, and the outputs are sums
  over the devices.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from simplernn_jax.ops.collectives import all_gather, psum, remat_if_fsdp, vary_like
from simplernn_jax.ops.dtypes import accumulator_dtype
from simplernn_jax.ops.matmul import fused_matmul


def fused_projection(
    x: jax.Array, kernels: Sequence[jax.Array], dtype: Any, *, row_parallel: bool = False
) -> tuple[jax.Array, ...]:
    """Apply `fused_matmul` to sharded kernels; raises what it does.

    Args:
      x: ``[..., in]``, or this device's inputs ``[..., in / tensor]`` if `row_parallel`.
      kernels: this device's shards, all column parallel or all row parallel.
      dtype: dtype of the operands.
      row_parallel: sum the results over ``tensor``: they are ``[..., out]``, otherwise
        ``[..., out / tensor]``.
    """
    x = vary_like(x, *kernels)  # its gradient is summed over `tensor` once for all kernels
    run = partial(_gather_and_multiply, dtype=dtype, gathered_axis=int(row_parallel))
    outputs = remat_if_fsdp(run)(x, tuple(kernels))
    return psum(outputs, "tensor") if row_parallel else outputs


def _gather_and_multiply(
    x: jax.Array, kernels: tuple[jax.Array, ...], *, dtype: Any, gathered_axis: int
) -> tuple[jax.Array, ...]:
    whole = [all_gather(kernel, "fsdp", gathered_axis, after=x) for kernel in kernels]
    return fused_matmul(x, whole, dtype)


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
