"""Gradient accumulation and BPTT over windows, as transformations of loss and gradient functions.

A loss function maps ``(params, batch, carried, dropout_key, predictions)`` to ``(loss,
carried)``; a gradient function maps them to ``(loss, gradient, carried)``. `carried` is the
recurrent state before the batch, or () for none, reset where `batch.reset`. `dropout_key` is a
typed PRNG key, `predictions` an int32 scalar of at least 1. The loss, a float32 scalar, is a sum
divided by `predictions`, so that the losses of all microbatches and windows add up to a mean.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from simplernn_jax.array_types import ModelState
from simplernn_jax.config import Config
from simplernn_jax.data.batches import Batch
from simplernn_jax.ops.primitive import vary_like
from simplernn_jax.ops.segments import segment_starts
from simplernn_jax.parallel.shardings import is_distributed, is_on_cpu

LossFn = Callable[..., tuple[jax.Array, ModelState]]
GradFn = Callable[..., tuple[jax.Array, nnx.State, ModelState]]

_MICROBATCH_TOKENS = 1024
"""With a few hundred channels, a layer's activations are a few MB, the size of an L2 cache."""
_MAX_SEQUENCES = 8192
"""Number of sequences up to which the divisors of a batch are searched."""


def choose_microbatches(config: Config, mesh: Mesh | None) -> Config:
    """Return the configuration with ``train.gradient_accumulation`` set, where it is None.

    On a single CPU device, it is the divisor of ``data.batch_size`` whose microbatches come
    closest, by their ratio, to 1,024 tokens; elsewhere 1. As this depends on sizes alone, results
    are bitwise independent of the number of cores.
    """
    if config.train.gradient_accumulation is not None:
        return config
    size, microbatches = config.data.batch_size, 1
    if is_on_cpu(mesh) and not is_distributed(mesh):
        length = config.train.bptt_window or config.data.sequence_length
        divisors = [n for n in range(1, min(size, _MAX_SEQUENCES) + 1) if size % n == 0]
        ratios = {n: abs(math.log(n * length / _MICROBATCH_TOKENS)) for n in [*divisors, size]}
        microbatches = size // min(ratios, key=ratios.__getitem__)
    train = dataclasses.replace(config.train, gradient_accumulation=microbatches)
    return dataclasses.replace(config, train=train)


def value_and_grad_with_carry(loss_fn: LossFn) -> GradFn:
    """Return the gradient function of `loss_fn`, with `stop_gradient` on the carried state."""

    def grad_fn(params: nnx.State, batch: Batch, carried: ModelState, *rest: Any) -> Any:
        carried = jax.lax.stop_gradient(carried)
        value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, carried), gradient = value_and_grad(params, batch, carried, *rest)
        return loss, gradient, carried

    return grad_fn


def accumulate_gradients(grad_fn: GradFn, num_microbatches: int) -> GradFn:
    """Accumulate the gradient over microbatches.

    Args:
      grad_fn: gradient function of one microbatch ``[B / num_microbatches, ...]``.
      num_microbatches: divides B, otherwise `reshape` raises TypeError (ValueError for NumPy
        arrays); 0 means 1.

    Returns:
      The gradient function of a batch ``[B, ...]``; losses and gradients of microbatches are
      summed, and microbatch i has the dropout key ``fold_in(dropout_key, i)``.
    """
    if num_microbatches <= 1:
        return grad_fn

    def accumulated_grad_fn(
        params: nnx.State, batch: Batch, carried: ModelState, key: jax.Array, predictions: jax.Array
    ) -> tuple[jax.Array, nnx.State, ModelState]:
        def add(sums: Any, microbatch: Any) -> tuple[Any, ModelState]:
            index, sequences, carried = microbatch
            microbatch_key = jax.random.fold_in(key, index)
            *new, carried = grad_fn(params, sequences, carried, microbatch_key, predictions)
            return jax.tree.map(jnp.add, sums, tuple(new)), carried

        microbatches = jax.tree.map(
            lambda x: x.reshape(num_microbatches, -1, *x.shape[1:]), (batch, carried)
        )
        sums = _zero_loss(batch), _zeros_like(params)
        sums, carried = jax.lax.scan(add, sums, (jnp.arange(num_microbatches), *microbatches))
        return *sums, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), carried)

    return accumulated_grad_fn


def split_into_windows(batch: Batch, window: int) -> Batch:
    """Split a batch ``[B, T]`` into BPTT windows ``[B, T / window, window]``; `window` divides T.

    `reset` becomes ``[B, T / window]`` bool: True where a window's first token starts a segment.
    Where `window` does not divide T, `reshape` raises TypeError (ValueError for NumPy arrays).
    """
    arrays: Any = batch
    begins = segment_starts(arrays.segment_ids)[:, ::window].at[:, 0].set(arrays.reset)
    return Batch._make([*(x.reshape(x.shape[0], -1, window) for x in arrays[:4]), begins])


def truncated_bptt(loss_fn: LossFn) -> GradFn:
    """Return the gradient function of truncated BPTT over the windows of `split_into_windows`.

    Each window starts from the final state of the previous one, as a constant (Williams and Peng
    1990). The loss covers the whole sequence; the gradient is the sum of per-window gradients; peak
    memory is what one window needs.
    """
    grad_fn = value_and_grad_with_carry(loss_fn)

    def truncated_grad_fn(params: nnx.State, batch: Batch, carried: ModelState, *rest: Any) -> Any:
        def add(sums: Any, carried: ModelState, *window: Any) -> Any:
            *new, carried = grad_fn(params, window[0], carried, *window[1:])
            return jax.tree.map(jnp.add, sums, tuple(new)), carried

        after = partial(jax.eval_shape, loss_fn, params)
        sums = _zero_loss(batch), _zeros_like(params)
        (loss, gradient), carried = _scan_windows(add, sums, after, batch, carried, *rest)
        return loss, gradient, carried

    return truncated_grad_fn


def remat_windows(loss_fn: LossFn) -> LossFn:
    """Return a loss over all windows whose gradient needs the activation memory of one window.

    The forward pass saves the state before each window; the backward pass recomputes one window at
    a time, which costs one more forward pass.
    """

    def windows_loss_fn(params: nnx.State, batch: Batch, carried: ModelState, *rest: Any) -> Any:
        remat_loss = jax.checkpoint(loss_fn, prevent_cse=False)  # not needed inside a scan

        def add(total: jax.Array, carried: ModelState, *window: Any) -> Any:
            loss, carried = remat_loss(params, window[0], carried, *window[1:])
            return total + loss, carried

        after = partial(jax.eval_shape, loss_fn, params)
        return _scan_windows(add, _zero_loss(batch), after, batch, carried, *rest)

    return windows_loss_fn


def _scan_windows(
    add: Callable[..., Any],
    sums: Any,
    shapes_after: Callable[..., tuple[Any, ModelState]],
    batch: Batch,
    carried: ModelState,
    key: jax.Array,
    predictions: jax.Array,
) -> Any:
    """Scan over windows: ``add(sums, carried, window, key, predictions) -> (sums, carried)``."""

    def step(carry: Any, numbered: Any) -> tuple[Any, None]:
        index, window = numbered
        return add(*carry, window, jax.random.fold_in(key, index), predictions), None

    windows = jax.tree.map(lambda x: x.swapaxes(0, 1), batch)
    first = jax.tree.map(lambda x: x[0], windows)
    _, ends = shapes_after(first, carried, key, predictions)
    carried = carried or jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), ends)
    carried = jax.tree.map(vary_like, carried, ends)
    indices = jnp.arange(windows.reset.shape[0])
    return jax.lax.scan(step, (sums, carried), (indices, windows))[0]


def _zero_loss(batch: Any) -> jax.Array:
    return vary_like(jnp.zeros(()), *batch)


def _zeros_like(params: nnx.State) -> nnx.State:
    return jax.tree.map(lambda param: vary_like(jnp.zeros_like(param), param), params)
