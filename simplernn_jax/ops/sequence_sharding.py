"""The recurrence with operands that are sharded under `jit`: over batch, heads and time.

Sequences and heads are independent. Sequence shards run in parallel, each from a zero state; their
final states and decays, K (V + 1) numbers per head, are gathered, and give every device the state
before its shard (`incoming_state`). The gradient gathers the cotangents of the states likewise. K
and V are not sharded. One all-gather, as T may be sharded over several mesh axes, in either
direction; `sequence_parallel` permutes in log2(n) steps, and shards one axis.
"""

from typing import Any

import jax
import jax.numpy as jnp

from simplernn_jax.ops.implementations import Implementation
from simplernn_jax.ops.incoming_state import BeforeReset, decayed_queries, read_state, shard_decay
from simplernn_jax.ops.partitioning import MeshAxesByDim, Partitioned
from simplernn_jax.ops.scan import RecurrenceInputs

_INPUTS = ("b t h k", "b t h k", "b t h v", "b t h k", "b h k v")
_RESET = "b t"
_RESULTS = ("b t h v", "b h k v")


def partition_recurrence(has_reset: bool) -> Partitioned:
    """Partition `RecurrenceInputs`, with or without `reset`, to (output, final state)."""

    def on_shards(impl: Implementation, mesh_axes: MeshAxesByDim) -> Implementation:
        axes = mesh_axes["t"]
        return (lambda *args: _run_shard(impl, axes, RecurrenceInputs(*args))) if axes else impl

    inputs = (*_INPUTS, _RESET) if has_reset else _INPUTS
    return Partitioned(inputs, _RESULTS, ("k", "v"), on_shards)


def partition_gradient(forward: Implementation, has_reset: bool) -> Partitioned:
    """Partition (inputs, cotangents of the results) to the cotangents of the first five inputs.

    Args:
      forward: the recurrence.
      has_reset: whether `reset` is among the inputs.
    """

    def on_shards(impl: Implementation, mesh_axes: MeshAxesByDim) -> Implementation:
        axes = mesh_axes["t"]

        def run(*args: Any) -> Any:
            return _shard_gradient(forward, impl, axes, RecurrenceInputs(*args[:-2]), *args[-2:])

        return run if axes else impl

    inputs = (*_INPUTS, _RESET, *_RESULTS) if has_reset else (*_INPUTS, *_RESULTS)
    return Partitioned(inputs, _INPUTS, ("k", "v"), on_shards)


def _run_shard(
    impl: Implementation, axes: tuple[str, ...], inputs: RecurrenceInputs
) -> list[jax.Array]:
    """Compute the outputs of this shard, and the final state of the whole sequence."""
    q, _, v, log_gate, initial_state, reset = inputs
    before_reset = _before_reset(reset)
    output, state = _from_zero(impl, inputs)
    decay = shard_decay(log_gate.astype(state.dtype), before_reset)
    incoming, final = _scan_shards(axes, decay, state, initial_state)
    return [(output + read_state(q, log_gate, before_reset, incoming)).astype(v.dtype), final]


def _shard_gradient(
    forward: Implementation,
    gradient: Implementation,
    axes: tuple[str, ...],
    inputs: RecurrenceInputs,
    d_output: jax.Array,
    d_final: jax.Array,
) -> list[jax.Array]:
    q, _, _, log_gate, initial_state, reset = inputs
    before_reset = _before_reset(reset)
    _, state = _from_zero(forward, inputs)
    decay = shard_decay(log_gate.astype(state.dtype), before_reset)
    incoming, _ = _scan_shards(axes, decay, state, initial_state)
    queries = decayed_queries(q, log_gate, before_reset)
    d_state = jnp.einsum("bthk,bthv->bhkv", queries, d_output.astype(state.dtype))
    d_outgoing, d_initial = _scan_shards(axes, decay, d_state, d_final, reverse=True)
    arrays = inputs._replace(state=incoming).arrays()
    return [*gradient(*arrays, d_output, d_outgoing)[:4], d_initial]


def _from_zero(impl: Implementation, inputs: RecurrenceInputs) -> tuple[jax.Array, jax.Array]:
    output, state = impl(*inputs._replace(state=jnp.zeros_like(inputs.state)).arrays())
    return output, state


def _before_reset(reset: jax.Array | None) -> BeforeReset:
    return None if reset is None else jnp.cumsum(reset, axis=1) == 0


def _scan_shards(
    axes: tuple[str, ...],
    decay: jax.Array,
    state: jax.Array,
    before: jax.Array,
    *,
    reverse: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Scan ``S' = decay S + state`` over shards from `before`: incoming state and the last."""
    states, decays = jax.lax.all_gather((state, decay), axes)
    index, entering = jax.lax.axis_index(axes), before
    shards = range(states.shape[0])
    for shard in reversed(shards) if reverse else shards:
        entering = jnp.where(index == shard, before, entering)
        before = decays[shard][..., None] * before + states[shard]
    return entering, before
