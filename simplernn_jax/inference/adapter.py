"""Adapters: files of the low-rank updates that a run has learned (`models.low_rank`).

They have a digest, as saved states do, and the fingerprint of the model that they update.
"""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import nnx

from simplernn_jax.devices import host_memory
from simplernn_jax.errors import UserError
from simplernn_jax.files import read_file, write_file
from simplernn_jax.inference.state import model_fingerprint
from simplernn_jax.models import LanguageModel
from simplernn_jax.models.low_rank import add_low_rank, init_low_rank, join_kernels, split_kernels
from simplernn_jax.models.pytorch_weights import decode_safetensors, digest_of
from simplernn_jax.parallel.named_leaves import named_leaves

_FORMAT = {"format": "simplernn_jax adapter", "version": "1"}


def save_adapter(path: str, model: LanguageModel, factors: dict[str, nnx.State]) -> None:
    """Save the factors ``a`` and ``b`` of the updates of `model`, atomically."""
    arrays = {name: np.ascontiguousarray(leaf) for name, leaf in named_leaves(factors).items()}
    rank = jax.tree.leaves(factors["a"])[0].shape[-1]
    header = {**_FORMAT, "model": model_fingerprint(model), "rank": str(rank)}
    header["sha256"] = digest_of(header, arrays)
    write_file(path, safetensors.numpy.save(arrays, header))


def load_adapter(path: str, model: LanguageModel) -> LanguageModel:
    """Return `model` with the updates in a file merged into its parameters.

    Raises:
      UserError: no adapter, corrupt, or of another model.
    """
    try:
        arrays, header = decode_safetensors(read_file(path, (host_memory() or sys.maxsize) // 2))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read ({reason}); specify an adapter") from error
    if not _FORMAT.items() <= header.items():
        raise UserError(f"{path}: no adapter in version {_FORMAT['version']}; specify an adapter")
    if header.pop("sha256", None) != digest_of(header, arrays):
        raise UserError(f"{path}: corrupted; use another copy, or run train.py again to write it")
    if header.get("model") != model_fingerprint(model):
        raise UserError(
            f"{path}: an adapter of another model; use the --workdir and --checkpoint that its run "
            "started from"
        )
    graph, params = nnx.split(model)
    kernels, rest = split_kernels(params)
    try:
        rank = int(header["rank"])
        factors: Any = jax.eval_shape(lambda: init_low_rank(kernels, rank, jax.random.key(0)))
        names = named_leaves(factors)
        if any((arrays[n].shape, arrays[n].dtype) != (x.shape, x.dtype) for n, x in names.items()):
            raise ValueError("shapes")
    except (KeyError, ValueError, UserError) as error:
        raise UserError(f"{path}: holds other arrays than an adapter; use another file") from error
    leaves = [jnp.asarray(arrays[name]) for name in names]
    factors = jax.tree.unflatten(jax.tree.structure(factors), leaves)
    return nnx.merge(graph, join_kernels(add_low_rank(kernels, **factors), rest))
