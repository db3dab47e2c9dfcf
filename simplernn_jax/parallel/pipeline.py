"""Pipeline parallelism over the mesh axis ``pipeline``, with time chunks as microbatches.

Stage s works on chunk c at tick s + c: its layers' states stay on the stage, and activations are
sent to the next stage after each tick. All stages are busy except at both ends, when the first
chunk has not arrived or the last one has left (the bubble)::

    tick      0    1    2    3    4
    stage 0   c0   c1   c2   -    -
    stage 1   -    c0   c1   c2   -
    stage 2   -    -    c0   c1   c2

The schedule is GPipe's (arXiv:1811.06965) with time chunks in place of microbatches, as
in TeraPipe (arXiv:2102.07988): of earlier chunks a layer needs only their final state, so one
sequence can keep all stages busy. The gradient runs backwards through the same schedule.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from simplernn_jax.array_types import Activations, SegmentIds, TimeShardActivations
from simplernn_jax.ops.primitive import vary_like
from simplernn_jax.ops.segments import reset_state, segment_starts
from simplernn_jax.parallel.collectives import shift

MAX_CHUNKS_PER_STAGE = 4
"""The bubble is then below 1/5, negligible according to GPipe (arXiv:1811.06965,
section 2.3). Every chunk costs a saved state and makes matmuls smaller."""

AXIS = "pipeline"

Layer = Callable[[Any, Activations, Any, SegmentIds, jax.Array | None], tuple[Activations, Any]]
"""``(params, x [B, t, D], state, segment_ids [B, t], dropout_key) -> (y [B, t, D], state)``; the
state, whose leaves have axis B first, belongs to the segment of the first token."""


def choose_num_chunks(length: int, stages: int) -> int:
    """Choose the number of chunks of `length` tokens.

    The largest multiple of `stages`, up to `MAX_CHUNKS_PER_STAGE` of them, that divides `length`:
    each stage then gets an equal share of the output. `stages` divides `length` (`check_fits`).
    """
    return max(
        stages * times
        for times in range(1, MAX_CHUNKS_PER_STAGE + 1)
        if length % (stages * times) == 0
    )


def run_pipeline(
    layer: Layer,
    params: Any,
    x: Activations,
    states: Any,
    segment_ids: SegmentIds,
    *,
    chunks: int,
    dropout_key: jax.Array | None = None,
) -> tuple[TimeShardActivations, Any]:
    """Apply all layers to sequences, inside `jax.shard_map` with a manual axis ``pipeline``.

    Each tick saves its input chunk and states; the gradient recomputes the rest.

    Args:
      layer: the function of one layer.
      params: parameters of this stage's layers, leaves ``[layers per stage, ...]``.
      x: input of the first layer, ``[B, T, D]``, on every stage; only the first uses it.
      states: states of this stage's layers before the first token, leaves ``[B, layers per stage,
        ...]``; None is zero.
      segment_ids: ``[B, T]`` on every stage; a change of id resets the states to zero.
      chunks: a multiple of the number of stages that divides T; see `choose_num_chunks`.
      dropout_key: each layer gets it folded with the index of the layer and of the chunk; None is
        no dropout.

    Returns:
      The output of the last layer, ``[B, T / stages, D]`` on stage s: its s-th part, so that the
      stages share the loss; and the states of this stage's layers after the last token.
    """
    batch, length, width = x.shape
    stages, stage = jax.lax.axis_size(AXIS), jax.lax.axis_index(AXIS)
    # Once, outside of the loop: its gradient would be summed over devices in each tick.
    x = vary_like(x, stage)
    params = jax.tree.map(lambda leaf: vary_like(leaf, x), params)
    if states is None:
        states = _zero_states(layer, params, x, segment_ids)
    states = jax.tree.map(lambda leaf: leaf.swapaxes(0, 1), states)  # layers first
    layers = jax.checkpoint(
        partial(_layers_of_stage, layer, segment_ids, chunks, dropout_key),
        prevent_cse=False,  # not needed inside a scan
    )

    def step(carry: Any, now: Any) -> tuple[Any, Activations]:
        arrived, states = carry
        tick, entering = now
        y, states = layers(params, jnp.where(stage == 0, entering, arrived), states, tick - stage)
        return (shift(y, AXIS), states), y

    entering = x.reshape(batch, chunks, -1, width).swapaxes(0, 1)
    entering = jnp.pad(entering, ((0, stages - 1), (0, 0), (0, 0), (0, 0)))
    start = (jnp.zeros_like(entering[0]), states)
    ticks = jnp.arange(chunks + stages - 1, dtype=jnp.int32)
    end, _ = jax.eval_shape(step, start, (ticks[0], entering[0]))
    start = jax.tree.map(vary_like, start, end)
    (_, states), outputs = jax.lax.scan(step, start, (ticks, entering))
    # Only the last stage's are outputs of the model; each stage takes its part of them.
    outputs = jnp.where(stage == stages - 1, outputs[stages - 1 :], 0)
    outputs = jax.lax.psum_scatter(outputs, AXIS, scatter_dimension=0, tiled=True)
    outputs = outputs.swapaxes(0, 1).reshape(batch, length // stages, width)
    return outputs, jax.tree.map(lambda leaf: leaf.swapaxes(0, 1), states)


def _zero_states(layer: Layer, params: Any, x: Activations, segment_ids: SegmentIds) -> Any:
    """Zeros ``[B, layers per stage, ...]`` of the shapes of the layers' states."""

    def state(params: Any) -> Any:
        return layer(params, x, None, segment_ids, None)[1]

    shapes = jax.eval_shape(partial(jax.lax.map, state), params)
    zeros = jax.tree.map(lambda leaf: vary_like(jnp.zeros(leaf.shape, leaf.dtype), leaf), shapes)
    return jax.tree.map(lambda leaf: leaf.swapaxes(0, 1), zeros)


def _layers_of_stage(
    layer: Layer,
    segment_ids: SegmentIds,
    chunks: int,
    dropout_key: jax.Array | None,
    params: Any,
    x: TimeShardActivations,
    states: Any,
    chunk: jax.Array,
) -> tuple[TimeShardActivations, Any]:
    """Apply this stage's layers to one chunk; outside of the sequence, the states do not change.

    The output for such a chunk is not used, and its gradient is exactly zero, since layers are
    finite for finite inputs.
    """
    exists = (chunk >= 0) & (chunk < chunks)
    chunk = jnp.clip(chunk, 0, chunks - 1)
    ids, begins = (
        values.reshape(values.shape[0], chunks, -1).swapaxes(0, 1)[chunk]
        for values in (segment_ids, segment_starts(segment_ids))
    )
    per_stage = jax.tree.leaves(params)[0].shape[0]

    def apply(x: Activations, each: Any) -> tuple[Activations, Any]:
        params, state, index = each
        key = dropout_key
        if key is not None:
            key = jax.random.fold_in(jax.random.fold_in(key, index), chunk)
        return layer(params, x, reset_state(state, begins[:, 0]), ids, key)

    indices = jax.lax.axis_index(AXIS) * per_stage + jnp.arange(per_stage, dtype=jnp.int32)
    x, new_states = jax.lax.scan(apply, x, (params, states, indices))
    return x, jax.tree.map(lambda new, old: jnp.where(exists, new, old), new_states, states)
