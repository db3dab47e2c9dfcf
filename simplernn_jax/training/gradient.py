"""Loss of a batch and its gradient, on one device or on each device of a mesh."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from simplernn_jax.array_types import ModelState
from simplernn_jax.config import Config
from simplernn_jax.data.batches import Batch
from simplernn_jax.models.language_model import Initialized, initialize
from simplernn_jax.ops.primitive import vary_like, varying
from simplernn_jax.parallel.collectives import axis_index, psum
from simplernn_jax.parallel.mesh import TOKEN_AXES
from simplernn_jax.parallel.sequence import shard_segment_ids
from simplernn_jax.training.accumulation import (
    accumulate_gradients,
    remat_windows,
    truncated_bptt,
    value_and_grad_with_carry,
)
from simplernn_jax.training.losses import chunked_cross_entropy

BatchGradFn = Callable[
    [nnx.State, Batch, ModelState, jax.Array, jax.Array],
    tuple[jax.Array, jax.Array, nnx.State, ModelState],
]


def init_model(config: Config, key: jax.Array) -> Initialized:
    """Initialize the model for training: rematerialized, and stacked if there are stages."""
    return initialize(
        config.model, key, remat=config.train.remat, stack_layers=config.mesh.pipeline > 1
    )


def abstract_train_model(config: Config) -> Initialized:
    """Return graphdef and abstract parameters of `init_model`."""
    abstract: Initialized = jax.eval_shape(lambda: init_model(config, jax.random.key(0)))
    return abstract


def make_grad_fn(config: Config) -> BatchGradFn:
    """Build the loss and gradient function of a batch.

    It maps ``(params, batch, carried, rng, step)`` to ``(loss, predictions, gradient, carried)``;
    `rng` is raw uint32 key data, `step` int32. With ``train.bptt_window``, the batch is split
    by `split_into_windows`; ``train.gradient_accumulation`` None means 1. The loss is the mean over
    all predictions, in nats. Inside `jax.shard_map`, arguments and results are this device's
    shards, but loss and predictions are global.
    """
    graph, _ = abstract_train_model(config)
    dropout = config.model.dropout > 0

    def loss_fn(
        params: nnx.State, batch: Batch, carried: ModelState, key: jax.Array, predictions: jax.Array
    ) -> tuple[jax.Array, ModelState]:
        model = nnx.merge(graph, params)
        hidden, carried = model.hidden_states(
            batch.tokens,
            model.reset_states(carried, batch.reset) if carried else None,
            shard_segment_ids(jnp.asarray(batch.segment_ids)),
            dropout_key=key if dropout else None,
        )
        losses = chunked_cross_entropy(model.logits, hidden, batch.targets, batch.loss_mask)
        nll = jnp.sum(losses)
        return nll / predictions.astype(nll.dtype), carried

    if not config.train.bptt_window:
        microbatch_grad_fn = value_and_grad_with_carry(loss_fn)
    elif config.train.bptt == "truncated":
        microbatch_grad_fn = truncated_bptt(loss_fn)
    else:
        microbatch_grad_fn = value_and_grad_with_carry(remat_windows(loss_fn))
    sum_grad_fn = accumulate_gradients(microbatch_grad_fn, config.train.gradient_accumulation or 1)

    def batch_grad_fn(
        params: nnx.State, batch: Any, carried: ModelState, rng: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, jax.Array, nnx.State, ModelState]:
        predictions = psum(jnp.sum(batch.loss_mask), *TOKEN_AXES)
        key = _fold_in_device(jax.random.fold_in(jax.random.wrap_key_data(rng), step))
        # Cast to varying, so that their gradients are summed over devices once, after all
        # microbatches.
        varying_params = jax.tree.map(lambda param: vary_like(param, *batch), params)
        divisor = jnp.maximum(predictions, 1)
        loss, gradient, final = sum_grad_fn(varying_params, batch, carried, key, divisor)
        carried = final if carried else ()
        return psum(loss, *TOKEN_AXES), predictions, _sum_over_replicas(gradient, params), carried

    return batch_grad_fn


def _fold_in_device(key: jax.Array) -> jax.Array:
    """Derive a dropout key for each device that sees different tokens."""
    for name in TOKEN_AXES:
        if not isinstance(index := axis_index(name), int):
            key = jax.random.fold_in(key, index)
    return key


def _sum_over_replicas(gradient: nnx.State, params: nnx.State) -> nnx.State:
    """Sum over the devices that hold the same shard of a parameter and see different tokens."""

    def total(gradient: jax.Array, param: jax.Array) -> jax.Array:
        return psum(gradient, *(name for name in TOKEN_AXES if name not in varying(param)))

    return jax.tree.map(total, gradient, params)
