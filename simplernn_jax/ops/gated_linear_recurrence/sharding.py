"""The recurrence of sequences in shards: over batch and heads, and over time.

Sequences and heads are independent. Shards of time run in parallel, each from a zero state. With
b_i the inclusive sum of the log gates from the shard's start, and S_in the state before it, ::

    y_i = (y_i from a zero state) + (q_i e^{b_i})^T S_in
    S_out = diag(e^{b_T}) S_in + (S_out from a zero state)

so the devices exchange K (V + 1) numbers per head and sequence, however long the shards are
(`join_shards`). Gradients come from differentiating the collectives. K and V are not sharded. Only
tokens before the shard's first reset read S_in: `before_reset` ``[B, T]`` bool marks them; None is
all of them.

`partition` partitions operands that are sharded under `jit`; `simplernn_jax.parallel.sequence` does
it inside `jax.shard_map`.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from simplernn_jax.ops.gated_linear_recurrence.scan import RecurrenceInputs
from simplernn_jax.ops.primitive import Implementation


def join_shards(
    axes: tuple[str, ...],
    from_zero: tuple[jax.Array, jax.Array],
    q: jax.Array,
    log_gate: jax.Array,
    initial: jax.Array | None,
    before_reset: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Continue shards from the states before them.

    Args:
      axes: mesh axes, whose devices hold consecutive shards.
      from_zero: output and final state of this device's shard from a zero state.
      q: ``[B, T, H, K]`` of this shard.
      log_gate: likewise.
      initial: state before the first shard; None is zero.
      before_reset: ``[B, T]`` bool, or None.

    Returns:
      The output of this shard, and on all devices the state after the last one.
    """
    output, state = from_zero
    log_gate = log_gate.astype(state.dtype)
    if initial is None:
        initial = jnp.zeros_like(state)
    decay = jnp.exp(jnp.sum(log_gate, axis=1))
    if before_reset is not None:
        decay = jnp.where(before_reset[:, -1, None, None], decay, 0)
    incoming, final = _scan_shards(axes, decay, state, initial)
    # The gradient recomputes the decays instead of saving one more array of every token.
    read = jax.checkpoint(_read_state)(q, log_gate, before_reset, incoming)
    return (output + read).astype(output.dtype), final


def _read_state(
    q: jax.Array, log_gate: jax.Array, before_reset: jax.Array | None, incoming: jax.Array
) -> jax.Array:
    """Compute ``(q_i e^{b_i})^T S_in`` ``[B, T, H, V]``."""

    def masked(x: jax.Array) -> jax.Array:
        return x if before_reset is None else jnp.where(before_reset[..., None, None], x, 0)

    decayed = masked(q.astype(log_gate.dtype) * jnp.exp(jnp.cumsum(masked(log_gate), axis=1)))
    return masked(jnp.einsum("bthk,bhkv->bthv", decayed, incoming))


_INPUTS = ("b t h k", "b t h k", "b t h v", "b t h k", "b h k v")
_RESULTS = ("b t h v", "b h k v")
_REPLICATED = ("k", "v")


def partition(
    forward: Implementation, gradient: Implementation, has_reset: bool
) -> tuple[Implementation, Implementation]:
    """Partition the recurrence and its gradient.

    Args:
      forward: `RecurrenceInputs` to (output, final state); JAX can differentiate it.
      gradient: (inputs, cotangents of the results) to those of the first five inputs.
      has_reset: whether `reset` is among the inputs.
    """
    inputs = (*_INPUTS, "b t") if has_reset else _INPUTS
    on_shards = [functools.partial(f, forward) for f in (_run_shard, _shard_gradient)]
    return (
        _partitioned(forward, inputs, _RESULTS, on_shards[0]),
        _partitioned(gradient, (*inputs, *_RESULTS), _INPUTS, on_shards[1]),
    )


def _partitioned(
    impl: Implementation,
    inputs: tuple[str, ...],
    results: tuple[str, ...],
    on_time_shards: Callable[..., Any],
) -> Implementation:
    """Wrap `impl` in `custom_partitioning`, by the named axes of each array.

    Each device runs `impl` on its shards of sequences and heads. If time is sharded, it runs
    ``on_time_shards(mesh axes of time, *arrays)``.
    """
    rule = f"{', '.join(inputs)} -> {', '.join(results)}"

    def partition(mesh: Mesh, arguments: Any, _: Any) -> Any:
        mesh_axes = _mesh_axes(mesh, inputs, arguments)

        def shardings(arrays: Sequence[str]) -> list[NamedSharding]:
            specs = [P(*(mesh_axes.get(name) for name in names.split())) for names in arrays]
            return [NamedSharding(mesh, spec) for spec in specs]

        time = mesh_axes.get("t")
        on_shard = functools.partial(on_time_shards, time) if time else impl
        return mesh, on_shard, shardings(results), tuple(shardings(inputs))

    wrapped = custom_partitioning(lambda *args: list(impl(*args)))
    wrapped.def_partition(
        partition=partition,
        sharding_rule=lambda *_: (rule, {"need_replication_factors": _REPLICATED}),
    )
    return wrapped


def _mesh_axes(mesh: Mesh, inputs: Sequence[str], arguments: Any) -> dict[str, tuple[str, ...]]:
    """Choose the mesh axes over which each named axis is sharded, by the arguments' shardings."""
    mesh_axes: dict[str, tuple[str, ...]] = {}
    for names, x in zip(inputs, arguments, strict=True):
        for name, size, axes in zip(names.split(), x.shape, x.sharding.spec, strict=False):
            wanted = (axes,) if isinstance(axes, str) else tuple(axes or ())
            # Each mesh axis may shard one array axis; skip uneven shards, whose padding is
            # undefined.
            taken = {axis for others in mesh_axes.values() for axis in others}
            is_free = name not in {*_REPLICATED, *mesh_axes} and taken.isdisjoint(wanted)
            if wanted and is_free and size % math.prod(mesh.shape[a] for a in wanted) == 0:
                mesh_axes[name] = wanted
    return mesh_axes


def _run_shard(
    forward: Implementation, axes: tuple[str, ...], *arrays: jax.Array
) -> list[jax.Array]:
    """Compute the outputs of this shard, and the final state of the whole sequence."""
    inputs = RecurrenceInputs(*arrays)
    output, state = forward(*inputs._replace(state=jnp.zeros_like(inputs.state)).arrays())
    before_reset = None if inputs.reset is None else jnp.cumsum(inputs.reset, axis=1) == 0
    return list(
        join_shards(axes, (output, state), inputs.q, inputs.log_gate, inputs.state, before_reset)
    )


def _shard_gradient(
    forward: Implementation, axes: tuple[str, ...], *arrays: jax.Array
) -> list[jax.Array]:
    """Compute the gradients of this shard's inputs, and of the initial state."""
    *inputs, d_output, d_final = arrays
    floating, reset = inputs[: len(_INPUTS)], inputs[len(_INPUTS) :]
    _, vjp = jax.vjp(lambda *floating: _run_shard(forward, axes, *floating, *reset), *floating)
    # All devices hold the initial state and the final one: count each cotangent once.
    is_first = jnp.equal(jax.lax.axis_index(axes), 0)
    *gradients, d_initial = vjp([d_output, jnp.where(is_first, d_final, 0)])
    return [*gradients, jax.lax.psum(d_initial, axes)]


def _scan_shards(
    axes: tuple[str, ...], decay: jax.Array, state: jax.Array, initial: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Scan ``S' = decay S + state`` over shards, from `initial`, in log2(n) + 1 exchanges.

    Two consecutive shards compose to ``(D_1 D_2, D_2 S_1 + S_2)``, which is associative. Returns
    the state that enters this device's shard, and on all devices the one after all shards.
    """
    size, place = jax.lax.axis_size(axes), jax.lax.axis_index(axes)
    is_first = jnp.equal(place, 0)

    def shift(x: jax.Array, by: int) -> jax.Array:
        return jax.lax.ppermute(x, axes, [(i, i + by) for i in range(size - by)])

    decay = decay[..., None]
    # What leaves the first shard depends on no other shard.
    state = jnp.where(is_first, decay * initial + state, state)
    decay = jnp.where(is_first, 0, decay)
    distance = 1
    while distance < size:
        # The first shards receive zeros, which change no state.
        before = shift(jnp.concatenate([state, decay], axis=-1), distance)
        state = decay * before[..., :-1] + state
        decay = decay * before[..., -1:]
        distance *= 2
    last = jax.lax.psum(jnp.where(place == size - 1, state, 0), axes)
    return jnp.where(is_first, initial, shift(state, 1)), last
