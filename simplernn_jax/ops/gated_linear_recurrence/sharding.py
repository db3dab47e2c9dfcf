"""The recurrence of sequences in shards: over batch and heads, and over time.

Sequences and heads are independent. Shards of time run in parallel, each from a zero state. With
b_i the inclusive sum of the log gates from the shard's start, and S_in the state before it, ::

    y_i = (y_i from a zero state) + (q_i e^{b_i})^T S_in
    S_out = diag(e^{b_T}) S_in + (S_out from a zero state)

so the devices exchange K (V + 1) numbers per head and sequence, however long the shards are
(`scan_shards`); the gradient exchanges the cotangents of the states likewise. K and V are not
sharded. Only tokens before the shard's first reset read S_in: `before_reset` ``[B, T]`` bool marks
them; None is all of them.

`partition_recurrence` and `partition_gradient` partition operands that are sharded under `jit`;
`simplernn_jax.parallel.sequence` does it inside `jax.shard_map`.
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

BeforeReset = jax.Array | None


def shard_decay(log_gate: jax.Array, before_reset: BeforeReset) -> jax.Array:
    """Compute e^{b_T} ``[B, H, K]``, zero where the shard resets the state."""
    decay = jnp.exp(jnp.sum(log_gate, axis=1))
    return decay if before_reset is None else jnp.where(before_reset[:, -1, None, None], decay, 0)


def decayed_queries(q: jax.Array, log_gate: jax.Array, before_reset: BeforeReset) -> jax.Array:
    """Compute ``q_i e^{b_i}`` ``[B, T, H, K]`` at the tokens that read S_in, zero elsewhere."""

    def masked(x: jax.Array) -> jax.Array:
        return x if before_reset is None else jnp.where(before_reset[..., None, None], x, 0)

    return masked(q.astype(log_gate.dtype) * jnp.exp(jnp.cumsum(masked(log_gate), axis=1)))


def read_state(
    q: jax.Array, log_gate: jax.Array, before_reset: BeforeReset, incoming: jax.Array
) -> jax.Array:
    """Compute ``(q_i e^{b_i})^T S_in`` ``[B, T, H, V]``."""
    y = jnp.einsum("bthk,bhkv->bthv", decayed_queries(q, log_gate, before_reset), incoming)
    return y if before_reset is None else jnp.where(before_reset[..., None, None], y, 0)


_INPUTS = ("b t h k", "b t h k", "b t h v", "b t h k", "b h k v")
_RESULTS = ("b t h v", "b h k v")
_REPLICATED = ("k", "v")


def partition_recurrence(has_reset: bool) -> Callable[[Implementation], Implementation]:
    """Partition `RecurrenceInputs`, with or without `reset`, to (output, final state)."""
    return _partitioned(_inputs(has_reset), _RESULTS, _run_shard)


def partition_gradient(
    forward: Implementation, has_reset: bool
) -> Callable[[Implementation], Implementation]:
    """Partition (inputs, cotangents of the results) to the cotangents of the first five inputs.

    Args:
      forward: the recurrence.
      has_reset: whether `reset` is among the inputs.
    """
    on_shards = functools.partial(_shard_gradient, forward)
    return _partitioned((*_inputs(has_reset), *_RESULTS), _INPUTS, on_shards)


def _inputs(has_reset: bool) -> tuple[str, ...]:
    return (*_INPUTS, "b t") if has_reset else _INPUTS


def _partitioned(
    inputs: tuple[str, ...], results: tuple[str, ...], on_time_shards: Callable[..., Any]
) -> Callable[[Implementation], Implementation]:
    """Build a wrapper in `custom_partitioning`, by the named axes of each array.

    Each device runs the implementation on its shards of sequences and heads. If time is sharded, it
    runs ``on_time_shards(implementation, mesh axes of time, *arrays)``.
    """
    rule = f"{', '.join(inputs)} -> {', '.join(results)}"

    def wrap(impl: Implementation) -> Implementation:
        def partition(mesh: Mesh, arguments: Any, _: Any) -> Any:
            mesh_axes = _mesh_axes(mesh, inputs, arguments)

            def shardings(arrays: Sequence[str]) -> list[NamedSharding]:
                specs = [P(*(mesh_axes.get(name) for name in names.split())) for names in arrays]
                return [NamedSharding(mesh, spec) for spec in specs]

            time = mesh_axes.get("t")
            on_shard = functools.partial(on_time_shards, impl, time) if time else impl
            return mesh, on_shard, shardings(results), tuple(shardings(inputs))

        wrapped = custom_partitioning(lambda *args: list(impl(*args)))
        wrapped.def_partition(
            partition=partition,
            sharding_rule=lambda *_: (rule, {"need_replication_factors": _REPLICATED}),
        )
        return wrapped

    return wrap


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


def _run_shard(impl: Implementation, axes: tuple[str, ...], *arrays: jax.Array) -> list[jax.Array]:
    """Compute the outputs of this shard, and the final state of the whole sequence."""
    inputs = RecurrenceInputs(*arrays)
    q, _, v, log_gate, initial_state, reset = inputs
    before_reset = _before_reset(reset)
    output, state = _from_zero(impl, inputs)
    decay = shard_decay(log_gate.astype(state.dtype), before_reset)
    incoming, final = scan_shards(axes, decay, state, initial_state)
    return [(output + read_state(q, log_gate, before_reset, incoming)).astype(v.dtype), final]


def _shard_gradient(
    forward: Implementation, gradient: Implementation, axes: tuple[str, ...], *arrays: jax.Array
) -> list[jax.Array]:
    """Compute the gradients of this shard's inputs, and of the initial state."""
    *arguments, d_output, d_final = arrays
    inputs = RecurrenceInputs(*arguments)
    q, _, _, log_gate, initial_state, reset = inputs
    before_reset = _before_reset(reset)
    _, state = _from_zero(forward, inputs)
    decay = shard_decay(log_gate.astype(state.dtype), before_reset)
    incoming, _ = scan_shards(axes, decay, state, initial_state)
    queries = decayed_queries(q, log_gate, before_reset)
    d_state = jnp.einsum("bthk,bthv->bhkv", queries, d_output.astype(state.dtype))
    d_outgoing, d_initial = scan_shards(axes, decay, d_state, d_final, reverse=True)
    arguments = inputs._replace(state=incoming).arrays()
    return [*gradient(*arguments, d_output, d_outgoing)[:4], d_initial]


def _from_zero(impl: Implementation, inputs: RecurrenceInputs) -> tuple[jax.Array, jax.Array]:
    output, state = impl(*inputs._replace(state=jnp.zeros_like(inputs.state)).arrays())
    return output, state


def _before_reset(reset: jax.Array | None) -> BeforeReset:
    return None if reset is None else jnp.cumsum(reset, axis=1) == 0


def scan_shards(
    axes: tuple[str, ...],
    decay: jax.Array,
    state: jax.Array,
    initial: jax.Array,
    *,
    reverse: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Scan ``S' = decay S + state`` over shards, from `initial`, in log2(n) + 1 exchanges.

    Two consecutive shards compose to ``(D_1 D_2, D_2 S_1 + S_2)``, which is associative.

    Args:
      axes: mesh axes, whose devices hold consecutive shards.
      decay: ``[B, H, K]`` of this device's shard.
      state: ``[B, H, K, V]`` after it, from a zero state.
      initial: state before the first shard; with `reverse`, after the last one.
      reverse: scan from the last shard to the first.

    Returns:
      The state that enters this device's shard, and on all devices the one after all shards.
    """
    size = jax.lax.axis_size(axes)
    place = jax.lax.axis_index(axes)
    place = size - 1 - place if reverse else place
    is_first = jnp.equal(place, 0)

    def shift(x: jax.Array, by: int) -> jax.Array:
        pairs = [(i, i + by) for i in range(size - by)]
        return jax.lax.ppermute(x, axes, [(b, a) for a, b in pairs] if reverse else pairs)

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
