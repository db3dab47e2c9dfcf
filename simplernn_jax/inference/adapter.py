"""Low-rank updates of the projections of a model (LoRA, arXiv:2106.09685), and their files.

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
from simplernn_jax.errors import UserError, library_errors
from simplernn_jax.files import write_file
from simplernn_jax.inference.state import (
    decode_arrays,
    encode_arrays,
    model_fingerprint,
    read_arrays,
)
from simplernn_jax.models import LanguageModel
from simplernn_jax.models.layers import PARAM_DTYPE, uniform_fan_in
from simplernn_jax.parallel.named_leaves import named_leaves

_KIND = "low-rank update"


def split_kernels(params: Any) -> tuple[nnx.State, nnx.State]:
    """Split parameters into the kernels that have updates, and the rest."""

    def is_updated(path: Any, param: Any) -> bool:
        return path[0] == "layers" and param.get_metadata("decay", False)

    kernels, rest = nnx.split_state(params, is_updated, ...)
    return kernels, rest


def init_low_rank(kernels: nnx.State, rank: int, key: jax.Array) -> dict[str, nnx.State]:
    """Initialize the float32 factors ``a`` and ``b`` of all kernels.

    Raises:
      UserError: the rank is larger than a dimension of a kernel.
    """
    factors: dict[str, list[Any]] = {"a": [], "b": []}
    for index, (path, kernel) in enumerate(nnx.to_flat_state(kernels)):
        *stack, rows, columns = kernel.shape
        if rank > min(rows, columns):
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


def add_low_rank(params: nnx.State, base: Any, a: Any, b: Any) -> nnx.State:
    """Return `params` whose kernels are ``W + scale A B``; `base` has W, in the order of leaves."""

    def updated(kernel: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        scale = 4 / math.sqrt(a.shape[-1])
        return kernel + scale * jnp.matmul(a, b, precision="highest")

    kernels, rest = split_kernels(params)
    # The metadata of a kernel and its factors differ, and so do the structures of the trees.
    leaves = list(map(updated, *map(jax.tree.leaves, (base, a, b))))
    result: nnx.State = nnx.merge_state(
        rest, jax.tree.unflatten(jax.tree.structure(kernels), leaves)
    )
    return result


def save_adapter(path: str, model: LanguageModel, factors: dict[str, nnx.State]) -> None:
    """Save the factors ``a`` and ``b`` of the updates of `model`, atomically."""
    write_file(path, encode_arrays(factors, _KIND, {"model": model_fingerprint(model)}))


def load_adapter(path: str, model: LanguageModel) -> LanguageModel:
    """Return `model` with the updates in a file merged into its parameters.

    Raises:
      UserError: no adapter, corrupt, or of another model.
    """
    arrays, _ = decode_arrays(
        path, read_arrays(path, _KIND), _KIND, {"model": model_fingerprint(model)}
    )
    graph, params = nnx.split(model)
    kernels, _ = split_kernels(params)
    with library_errors(f"{path}: its arrays do not fit this model", f"make the {_KIND} again"):
        a, b = (
            [jnp.asarray(arrays[f"{part}/{name}"], PARAM_DTYPE) for name in named_leaves(kernels)]
            for part in "ab"
        )
        updated = add_low_rank(params, kernels, a, b)
        found, wanted = ([x.shape for x in jax.tree.leaves(each)] for each in (updated, params))
        if found != wanted:
            raise ValueError("a kernel would have another shape")
    return nnx.merge(graph, updated)
