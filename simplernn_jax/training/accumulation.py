"""Gradient accumulation and truncated backpropagation: a batch in parts, in one program."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from simplernn_jax.array_types import ModelState
from simplernn_jax.data.batches import Batch
from simplernn_jax.ops import segment_starts
from simplernn_jax.ops.collectives import vary_like

Inputs = tuple[nnx.State, Batch, ModelState, jax.Array, jax.Array]
"""``params, batch, carried, dropout_key, predictions`` for a part of a batch.

`carried` is the state before it, or () for none, reset where `batch.reset`. The loss of a part is a
sum divided by `predictions`, so that the losses of all parts add up to a mean.
"""

LossOf = Callable[..., tuple[jax.Array, ModelState]]
"""Function of `Inputs` that returns loss and carried state."""

GradientOf = Callable[..., tuple[jax.Array, nnx.State, ModelState]]
"""Function of `Inputs` that returns loss, gradient and carried state."""


def with_gradient(loss_of: LossOf) -> GradientOf:
    """Add the gradient; the carried state is a constant."""

    def gradient_of(params: nnx.State, batch: Batch, carried: ModelState, *rest: Any) -> Any:
        carried = jax.lax.stop_gradient(carried)
        of_loss = jax.value_and_grad(loss_of, has_aux=True)
        (loss, carried), gradient = of_loss(params, batch, carried, *rest)
        return loss, gradient, carried

    return gradient_of


def accumulated(gradient_of: GradientOf, groups: int) -> GradientOf:
    """Accumulate the gradient over `groups` of sequences of equal number."""
    if groups == 1:
        return gradient_of

    def gradient_of_all(
        params: nnx.State, batch: Batch, carried: ModelState, key: jax.Array, predictions: jax.Array
    ) -> tuple[jax.Array, nnx.State, ModelState]:
        def add(sums: Any, group: Any) -> tuple[Any, ModelState]:
            index, rows, carried = group
            own_key = jax.random.fold_in(key, index)
            *part, carried = gradient_of(params, rows, carried, own_key, predictions)
            return jax.tree.map(jnp.add, sums, tuple(part)), carried

        by_group = jax.tree.map(lambda x: x.reshape(groups, -1, *x.shape[1:]), (batch, carried))
        sums = _zero_loss(batch), _zeros_like(params)
        sums, carried = jax.lax.scan(add, sums, (jnp.arange(groups), *by_group))
        return *sums, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), carried)

    return gradient_of_all


def windows_of(batch: Batch, window: int) -> Batch:
    """Split a batch ``[B, T]`` into backward windows ``[B, T / window, window]``.

    `window` divides T. `reset` becomes ``[B, T / window]``: True where a window begins a segment.
    """
    arrays: Any = batch
    begins = segment_starts(arrays.segment_ids)[:, ::window].at[:, 0].set(arrays.reset)
    return Batch._make([*(x.reshape(x.shape[0], -1, window) for x in arrays[:4]), begins])


def truncated(loss_of: LossOf) -> GradientOf:
    """Truncated backpropagation through time over the windows of `windows_of`.

    Each window starts from the final state of the one before, as a constant (Williams and Peng
    1990): the loss is that of the whole sequences, the gradient the sum of the windows' own, the
    memory that of one window.
    """
    gradient_of = with_gradient(loss_of)

    def gradient_of_all(params: nnx.State, batch: Batch, carried: ModelState, *rest: Any) -> Any:
        def add(sums: Any, carried: ModelState, *part: Any) -> Any:
            *new, carried = gradient_of(params, part[0], carried, *part[1:])
            return jax.tree.map(jnp.add, sums, tuple(new)), carried

        after = partial(jax.eval_shape, loss_of, params)
        sums = _zero_loss(batch), _zeros_like(params)
        (loss, gradient), carried = _scan_windows(add, sums, after, batch, carried, *rest)
        return loss, gradient, carried

    return gradient_of_all


def rematerialized_windows(loss_of: LossOf) -> LossOf:
    """Exact gradient through all windows of `windows_of`, with the memory of one.

    The forward pass saves the state before each window; the backward pass recomputes one window at
    a time, which costs one more forward pass.
    """

    def gradient_of_all(params: nnx.State, batch: Batch, carried: ModelState, *rest: Any) -> Any:
        remat_loss = jax.checkpoint(loss_of, prevent_cse=False)  # not needed inside a scan

        def add(total: jax.Array, carried: ModelState, *part: Any) -> Any:
            loss, carried = remat_loss(params, part[0], carried, *part[1:])
            return total + loss, carried

        after = partial(jax.eval_shape, loss_of, params)
        return _scan_windows(add, _zero_loss(batch), after, batch, carried, *rest)

    return gradient_of_all


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

    def step(carry: Any, part: Any) -> tuple[Any, None]:
        index, window = part
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
