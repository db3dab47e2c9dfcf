"""Low-rank updates of the projections of a model (LoRA, arXiv:2106.09685).

The kernel W of every dense layer of the blocks becomes ``W + scale A B``, and the model runs as
before: A is ``[D_in, rank]``, with the initial values of a dense layer, and B ``[rank, D_out]``,
initially zero; stacked layers have a leading axis. The scale is ``4 / sqrt(rank)``, so that one
learning rate suits all ranks (arXiv:2312.03732).
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from simplernn_jax.array_types import LogicalAxes
from simplernn_jax.errors import UserError
from simplernn_jax.models.layers import PARAM_DTYPE, uniform_fan_in


def split_kernels(params: Any) -> tuple[nnx.State, nnx.State]:
    """Split parameters into the kernels that have updates, and the rest; see `join_kernels`."""

    def is_updated(path: Any, param: Any) -> bool:
        return path[0] == "layers" and param.get_metadata("decay", False)

    kernels, rest = nnx.split_state(params, is_updated, ...)
    return kernels, rest


def join_kernels(kernels: nnx.State, rest: nnx.State) -> nnx.State:
    """Return the parameters that `split_kernels` split."""
    return nnx.merge_state(rest, kernels)


def init_low_rank(kernels: nnx.State, rank: int, key: jax.Array) -> dict[str, nnx.State]:
    """Initialize the float32 factors ``a`` and ``b`` of all kernels.

    Raises:
      UserError: the rank is larger than a dimension of a kernel.
    """
    factors: dict[str, list[Any]] = {"a": [], "b": []}
    for index, (path, kernel) in enumerate(nnx.to_flat_state(kernels)):
        *stack, rows, columns = kernel.shape
        if not 0 < rank <= min(rows, columns):
            raise UserError(
                f"config.train.tune=lora:{rank} is invalid: {'.'.join(map(str, path))} is "
                f"[{rows}, {columns}]; use a rank of at most {min(rows, columns)}"
            )
        *stacked, row_axis, column_axis = kernel.get_metadata("axes")
        shape = (*stack, rows, rank)
        a = uniform_fan_in(rows)(jax.random.fold_in(key, index), shape, PARAM_DTYPE)
        b = jnp.zeros((*stack, rank, columns), PARAM_DTYPE)
        for name, value, axes in (("a", a, (row_axis, None)), ("b", b, (None, column_axis))):
            factors[name].append((path, nnx.Param(value, axes=LogicalAxes(*stacked, *axes))))
    return {name: nnx.from_flat_state(leaves) for name, leaves in factors.items()}


def add_low_rank(kernels: nnx.State, a: nnx.State, b: nnx.State) -> nnx.State:
    """Return ``W + scale A B`` of all kernels."""

    def updated(kernel: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        scale = 4 / math.sqrt(a.shape[-1])
        return kernel + scale * jnp.matmul(a, b, precision="highest")

    # The metadata of a kernel and its factors differ, and so do the structures of the trees.
    leaves = map(updated, *map(jax.tree.leaves, (kernels, a, b)))
    result: nnx.State = jax.tree.unflatten(jax.tree.structure(kernels), list(leaves))
    return result
