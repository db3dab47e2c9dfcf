"""AdamW or Muon with warmup, cosine decay, a weight-decay mask and global-norm clipping."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from simplernn_jax.config import OptimizerConfig
from simplernn_jax.models.layers import EMBEDDING_AXES
from simplernn_jax.ops.newton_schulz import newton_schulz
from simplernn_jax.parallel.collectives import all_gather, axis_index
from simplernn_jax.parallel.mesh import is_distributed, variable_specs

MUON_MOMENTUM = 0.95
"""Momentum of the reference implementation of Muon (github.com/KellerJordan/Muon)."""

MUON_RMS = 0.2
"""Root mean square of Muon's updates, near AdamW's, so that both use similar learning rates
(arXiv:2502.16982, section 2.2)."""

REFERENCE_WIDTH = 128
"""Width of a model whose matrices and embedding have the given learning rate under Muon."""


def learning_rate_schedule(
    config: OptimizerConfig, warmup_steps: int | jax.Array, total_steps: int | jax.Array
) -> optax.Schedule:
    """Return the schedule, linear warmup and cosine decay, by the number of applied updates.

    It starts at 1/warmup of the peak, not at 0, and would reach its final fraction one update after
    the last. The numbers of steps may be traced.
    """
    total = jnp.asarray(total_steps, jnp.float32)
    warmup = jnp.minimum(jnp.asarray(warmup_steps, jnp.float32), total)
    first = config.learning_rate / jnp.maximum(warmup, 1)
    decay = optax.cosine_decay_schedule(config.learning_rate, 1.0, config.final_learning_rate)

    def rate(count: Any) -> jax.Array:
        count = jnp.asarray(count, jnp.float32)
        rising = first + (config.learning_rate - first) * count / jnp.maximum(warmup, 1)
        falling = decay((count - warmup) / jnp.maximum(total - warmup, 1))
        return jnp.where(count < warmup, rising, falling)

    return rate


def decay_mask(params: Any) -> Any:
    """Return a mask of parameters with the metadata ``decay``: matrices, an untied head too."""
    return _mask(params, "decay", True)


def _mask(params: Any, name: str, value: Any) -> Any:
    """Return a mask of parameters whose metadata `name` is `value`."""

    def is_on(param: Any) -> Any:
        found = isinstance(param, nnx.Variable) and param.get_metadata(name, None) == value
        return jax.tree.map(lambda _: found, param)

    return jax.tree.map(is_on, params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def make_optimizer(
    config: OptimizerConfig, total_steps: int, mesh: Mesh | None = None
) -> optax.GradientTransformationExtraArgs:
    """Return the optimizer of a run; ``adamw`` with weight_decay 0 is Adam.

    Updates may be given ``steps``, int32 [2], the steps of warmup and of the whole run in place of
    the given ones: a compiled program is then the same for runs of any length.

    Muon updates the matrices of `decay_mask`, so also an untied head, for which its authors use
    AdamW. Of a model of width D, it multiplies the updates of matrices and embedding by
    sqrt(REFERENCE_WIDTH / D), so that one learning rate suits all widths: features then change by
    as much in a step (arXiv:2310.17813). On a mesh, Adam is elementwise on shards; see
    `orthogonalize_sharded` for Muon.
    """

    def chain(steps: Any) -> optax.GradientTransformationExtraArgs:
        learning_rate = learning_rate_schedule(config, steps[0], steps[1])
        betas = {"b1": config.beta1, "b2": config.beta2, "eps": config.epsilon}
        if config.name == "muon":
            matrices = optax.chain(
                optax.trace(MUON_MOMENTUM, nesterov=True),
                optax.stateless(lambda updates, _: orthogonalize_sharded(updates, mesh)),
                optax.add_decayed_weights(config.weight_decay),
                optax.scale_by_learning_rate(learning_rate),
            )
            optimizer = optax.partition(
                {"matrices": matrices, "rest": optax.adam(learning_rate, **betas)},
                lambda params: jax.tree.map(
                    lambda is_matrix: "matrices" if is_matrix else "rest", decay_mask(params)
                ),
            )
        else:
            optimizer = optax.adamw(
                learning_rate, **betas, weight_decay=config.weight_decay, mask=decay_mask
            )
        # A chain of two with or without clipping: a run can be resumed with another clip_norm.
        clip = _clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
        return optax.chain(clip, optimizer)

    fixed = (config.warmup_steps, total_steps)

    def update(*args: Any, steps: jax.Array | None = None, **options: Any) -> Any:
        # optax promotes its integer counters, also under ``jax_numpy_dtype_promotion=strict``.
        with jax.numpy_dtype_promotion("standard"):
            updates, state = chain(fixed if steps is None else steps).update(*args, **options)
        return _scale_by_width(updates) if config.name == "muon" else updates, state

    return optax.GradientTransformationExtraArgs(chain(fixed).init, update)


def _scale_by_width(updates: Any) -> Any:
    """Multiply matrices and embedding by sqrt(REFERENCE_WIDTH / D), if the embedding is trained."""
    embedding = _mask(updates, "axes", EMBEDDING_AXES)
    pairs = zip(jax.tree.leaves(updates), jax.tree.leaves(embedding), strict=True)
    widths = [update.shape[-1] for update, is_embedding in pairs if is_embedding]
    if not widths:
        return updates
    factor = math.sqrt(REFERENCE_WIDTH / widths[0])

    def scale(update: jax.Array, is_matrix: bool, is_embedding: bool) -> jax.Array:
        return factor * update if is_matrix or is_embedding else update

    return jax.tree.map(scale, updates, decay_mask(updates), embedding)


def _clip_by_global_norm(max_norm: float) -> optax.GradientTransformationExtraArgs:
    """`optax.clip_by_global_norm` that may be given the norm."""

    def update(
        updates: Any, state: Any, params: Any = None, *, norm: jax.Array | None = None, **_: Any
    ) -> Any:
        del params
        norm = optax.tree.norm(updates) if norm is None else norm

        def clip(x: jax.Array) -> jax.Array:
            return jnp.where(norm < max_norm, x, x / norm.astype(x.dtype) * max_norm)

        return jax.tree.map(clip, updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def orthogonalize_sharded(matrices: Any, mesh: Mesh | None) -> Any:
    """Apply `newton_schulz` to each matrix of a tree, ``[..., m, n]`` float32, with any sharding.

    Results are scaled to a root mean square of about `MUON_RMS`. On a mesh every device gathers the
    matrices, one after the other, and keeps its shard of each result; of stacked layers it gathers
    only the layers of its stage.
    """
    leaves, tree = jax.tree.flatten(matrices)
    if not is_distributed(mesh):
        factors = newton_schulz(leaves)
        return jax.tree.unflatten(tree, [_scale_update(factor) for factor in factors])
    specs = tuple(jax.tree.leaves(variable_specs(matrices, mesh)))

    def run(*parts: jax.Array) -> tuple[jax.Array, ...]:
        results: list[jax.Array] = []
        for part, spec in zip(parts, specs, strict=True):
            sharded_axes = [
                (axis, name) for axis, name in enumerate(spec) if name not in (None, "pipeline")
            ]
            full = part
            for axis, name in sharded_axes:
                full = all_gather(full, name, axis, after=results[-1] if results else part)
            (factor,) = newton_schulz([full])
            result = _scale_update(factor)
            for axis, name in sharded_axes:
                start = axis_index(name) * part.shape[axis]
                result = jax.lax.dynamic_slice_in_dim(result, start, part.shape[axis], axis)
            results.append(result)
        return tuple(results)

    sharded_fn = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=specs)
    return jax.tree.unflatten(tree, sharded_fn(*leaves))


def _scale_update(factor: jax.Array) -> jax.Array:
    return MUON_RMS * math.sqrt(max(factor.shape[-2:])) * factor
