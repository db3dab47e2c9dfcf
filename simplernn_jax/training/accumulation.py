"""The gradient of a batch as a sum over parts of it, one after another in one program."""

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
"""``params, batch, carried, dropout_key, predictions`` of a part of a batch.

`carried` is the state that came before, or () for none; where `batch.reset` it is cleared. A loss
is a sum divided by `predictions`, so that those of parts can be added up.
"""

LossOf = Callable[..., tuple[jax.Array, ModelState]]
"""`Inputs` to loss and carried state."""

GradientOf = Callable[..., tuple[jax.Array, nnx.State, ModelState]]
"""`Inputs` to loss, gradient and carried state."""


def with_gradient(loss_of: LossOf) -> GradientOf:
    """Loss and gradient; what is carried into the part is a constant of it."""

    def gradient_of(params: nnx.State, batch: Batch, carried: ModelState, *rest: Any) -> Any:
        carried = jax.lax.stop_gradient(carried)
        of_loss = jax.value_and_grad(loss_of, has_aux=True)
        (loss, carried), gradient = of_loss(params, batch, carried, *rest)
        return loss, gradient, carried

    return gradient_of


def in_groups(gradient_of: GradientOf, groups: int) -> GradientOf:
    """Rows in `groups` of equal size: the gradient is that of all of them at once."""
    if groups == 1:
        return gradient_of

    def of_all(
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

    return of_all


def windows_of(batch: Batch, window: int) -> Batch:
    """A batch of rows ``[B, T]`` as windows ``[B, T / window, window]``; `window` divides T.

    `reset` becomes ``[B, T / window]``: a window is reset where it begins a segment.
    """
    arrays: Any = batch
    begins = segment_starts(arrays.segment_ids)[:, ::window].at[:, 0].set(arrays.reset)
    return Batch._make([*(x.reshape(x.shape[0], -1, window) for x in arrays[:4]), begins])


def truncated(loss_of: LossOf) -> GradientOf:
    """Of `windows_of` a batch, each with the state that the last one left, as a constant.

    That is truncated back-propagation through time (Williams and Peng 1990): the loss is that of
    the rows as a whole, the gradient the sum of the windows' own, the memory that of one window.
    """
    gradient_of = with_gradient(loss_of)

    def of_all(params: nnx.State, batch: Batch, carried: ModelState, *rest: Any) -> Any:
        def add(sums: Any, carried: ModelState, *part: Any) -> Any:
            *new, carried = gradient_of(params, part[0], carried, *part[1:])
            return jax.tree.map(jnp.add, sums, tuple(new)), carried

        after = partial(jax.eval_shape, loss_of, params)
        sums = _zero_loss(batch), _zeros_like(params)
        (loss, gradient), carried = _one_by_one(add, sums, after, batch, carried, *rest)
        return loss, gradient, carried

    return of_all


def rematerialized_windows(loss_of: LossOf) -> LossOf:
    """Of `windows_of` a batch; the gradient goes through all of them, to the row's first token.

    The forward pass keeps the state before each window, the backward pass computes one window at a
    time again: as exact as without windows, with the memory of one, for a forward pass more.
    """

    def of_all(params: nnx.State, batch: Batch, carried: ModelState, *rest: Any) -> Any:
        again = jax.checkpoint(loss_of, prevent_cse=False)  # a loop needs no protection from it

        def add(total: jax.Array, carried: ModelState, *part: Any) -> Any:
            loss, carried = again(params, part[0], carried, *part[1:])
            return total + loss, carried

        after = partial(jax.eval_shape, loss_of, params)
        return _one_by_one(add, _zero_loss(batch), after, batch, carried, *rest)

    return of_all


def _one_by_one(
    add: Callable[..., Any],
    sums: Any,
    shapes_after: Callable[..., tuple[Any, ModelState]],
    batch: Batch,
    carried: ModelState,
    key: jax.Array,
    predictions: jax.Array,
) -> Any:
    """Loops over windows: ``add(sums, carried, window, key, predictions) -> (sums, carried)``."""

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
