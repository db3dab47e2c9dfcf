"""The short convolution with operands that are sharded under `jit`: over batch and time.

A sequence shard needs the W - 1 normalized inputs before its first token from the shard before, and
for the gradient the cotangents of its own last ones from the shard after. Channels are not sharded,
since the norm is over all of them.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from simplernn_jax.ops.implementations import Implementation
from simplernn_jax.ops.partitioning import MeshAxesByDim, Partitioned
from simplernn_jax.ops.rms_norm import rms_norm

_X, _WEIGHTS, _RECENT, _TOKENS = "b t d", "w d", "b p d", "b t"
_REPLICATED = ("d", "w", "p")
_MINIMUM = (("t", "p"),)
"""A shard must be at least as long as the halo."""


def partition_convolution(has_starts: bool, has_scale: bool) -> Partitioned:
    """Partition (x, weights, recent[, starts]) to (y, final[, scale])."""

    def on_shards(impl: Implementation, mesh_axes: MeshAxesByDim) -> Implementation:
        time = mesh_axes["t"]

        def run(x: Any, weights: Any, recent: Any, *starts: Any) -> Sequence[jax.Array]:
            before = _inputs_before(time, x, recent, *starts)
            y, final, *scale = impl(x, weights, before, *starts)
            return y, _broadcast_from(jax.lax.axis_size(time) - 1, time, final), *scale

        return run if time else impl

    results = (_X, _RECENT, _TOKENS) if has_scale else (_X, _RECENT)
    return Partitioned(_inputs(has_starts), results, _REPLICATED, on_shards, _MINIMUM)


def partition_convolution_gradient(has_starts: bool) -> Partitioned:
    """Partition (inputs, scale, d_y, d_final) to the gradients of x, weights and recent."""

    def on_shards(impl: Implementation, mesh_axes: MeshAxesByDim) -> Implementation:
        time = mesh_axes["t"]

        def run(*args: Any) -> Sequence[jax.Array]:
            d_x, d_weights, d_recent = _shard_gradient(impl, time, *args) if time else impl(*args)
            return d_x, jax.lax.psum(d_weights, (*mesh_axes["b"], *time)), d_recent

        return run if time or mesh_axes["b"] else impl

    inputs = (*_inputs(has_starts), _TOKENS, _X, _RECENT)
    results = (_X, _WEIGHTS, _RECENT)
    return Partitioned(inputs, results, _REPLICATED, on_shards, _MINIMUM)


def _inputs(has_starts: bool) -> tuple[str, ...]:
    return (_X, _WEIGHTS, _RECENT, _TOKENS) if has_starts else (_X, _WEIGHTS, _RECENT)


def _shard_gradient(
    impl: Implementation, time: tuple[str, ...], x: Any, weights: Any, recent: Any, *others: Any
) -> Sequence[jax.Array]:
    *starts, scale, d_y, d_final = others
    past = recent.shape[1]
    before = _inputs_before(time, x, recent, *starts)
    # Only the first tokens of a shard read the inputs before it.
    first = [a[:, :past] for a in (*starts, scale, d_y)]
    _, _, d_before = impl(x[:, :past], weights, before, *first, jnp.zeros_like(d_final))
    size = jax.lax.axis_size(time)
    d_tail = jax.lax.ppermute(d_before, time, [(i + 1, i) for i in range(size - 1)])
    is_last = jax.lax.axis_index(time) == size - 1
    d_final = jnp.where(is_last, d_final, mask_to_last_segment(d_tail, *starts))
    d_x, d_weights, d_recent = impl(x, weights, before, *starts, scale, d_y, d_final)
    return d_x, d_weights, _broadcast_from(0, time, d_recent)


def mask_to_last_segment(tail: jax.Array, starts: jax.Array | None = None) -> jax.Array:
    """Zero the last P inputs ``[B, P, D]`` that are not in the last token's segment."""
    if starts is None:
        return tail
    past = tail.shape[1]
    late = jnp.pad(starts, ((0, 0), (past, 0)))[:, starts.shape[1] :].astype(jnp.int32)
    starts_after = jnp.flip(jnp.cumsum(jnp.flip(late, 1), axis=1), 1) - late
    return jnp.where(starts_after[..., None] > 0, 0, tail)


def _inputs_before(
    time: tuple[str, ...], x: jax.Array, recent: jax.Array, *starts: jax.Array
) -> jax.Array:
    """Compute the normalized inputs before this shard, zero where they are of other segments."""
    tail = rms_norm(x[:, x.shape[1] - recent.shape[1] :], native=False)
    size = jax.lax.axis_size(time)
    pairs = [(i, i + 1) for i in range(size - 1)]
    sent = jax.lax.ppermute(mask_to_last_segment(tail, *starts), time, pairs)
    return jnp.where(jax.lax.axis_index(time) == 0, recent, sent)


def _broadcast_from(index: int, time: tuple[str, ...], x: jax.Array) -> jax.Array:
    return jax.lax.psum(jnp.where(jax.lax.axis_index(time) == index, x, 0), time)
