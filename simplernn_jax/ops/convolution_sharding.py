"""The short convolution with operands that are sharded under `jit`: over batch and time.

A sequence shard needs the W - 1 normalized inputs before its first token, and for the gradient what
comes back to its own last ones: each is sent to a neighbor. Channels are not sharded, since the
norm is over all of them.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from simplernn_jax.ops.operation import Form
from simplernn_jax.ops.partitioning import Partitioned, axis_names
from simplernn_jax.ops.rms_norm import rms_norm

_X, _WEIGHTS, _RECENT, _TOKENS = "b t d", "w d", "b p d", "b t"


def partition_convolution(has_starts: bool, has_scale: bool) -> Partitioned:
    """Partition (x, weights, recent[, starts]) to (y, final[, scale])."""
    results = (_X, _RECENT, _TOKENS) if has_scale else (_X, _RECENT)
    return _Convolution(_inputs(has_starts), results, ("d", "w", "p"))


def partition_convolution_gradient(has_starts: bool) -> Partitioned:
    """Partition (inputs, scale, d_y, d_final) to the gradients of x, weights and recent."""
    inputs = (*_inputs(has_starts), _TOKENS, _X, _RECENT)
    return _Gradient(inputs, (_X, _WEIGHTS, _RECENT), ("d", "w", "p"))


def _inputs(has_starts: bool) -> tuple[str, ...]:
    return (_X, _WEIGHTS, _RECENT, _TOKENS) if has_starts else (_X, _WEIGHTS, _RECENT)


@dataclasses.dataclass(frozen=True)
class _Convolution(Partitioned):
    def admit(self, over: dict[str, Any], mesh: Mesh, inputs: Sequence[Any]) -> dict[str, Any]:
        x, _, recent = inputs[:3]
        shards = math.prod(mesh.shape[name] for name in axis_names(over.get("t")))
        if x.shape[1] // shards < recent.shape[1]:  # inputs of more than one neighbor
            over.pop("t", None)
        return over

    def shard_form(self, form: Form, over: Mapping[str, Any]) -> Form:
        time = axis_names(over.get("t"))
        if not time:
            return form

        def run(x: Any, weights: Any, recent: Any, *starts: Any) -> Sequence[jax.Array]:
            before = _before(time, _tail(x, recent.shape[1], starts), recent)
            y, final, *scale = form(x, weights, before, *starts)
            return y, _of(time, final, jax.lax.axis_size(time) - 1), *scale

        return run


@dataclasses.dataclass(frozen=True)
class _Gradient(_Convolution):
    def shard_form(self, form: Form, over: Mapping[str, Any]) -> Form:
        time, batch = axis_names(over.get("t")), axis_names(over.get("b"))

        def run(*args: Any) -> Sequence[jax.Array]:
            d_x, d_weights, d_recent = _shards_gradient(form, time, *args) if time else form(*args)
            if batch or time:  # a sum over the tokens of all devices
                d_weights = jax.lax.psum(d_weights, (*batch, *time))
            return d_x, d_weights, d_recent

        return run


def _shards_gradient(
    form: Form, time: tuple[str, ...], x: Any, weights: Any, recent: Any, *others: Any
) -> Sequence[jax.Array]:
    *starts, scale, d_y, d_final = others
    past = recent.shape[1]
    tail = _tail(x, past, starts)
    before = _before(time, tail, recent)
    # What a shard's tokens give back to the inputs before it: only its first ones read them.
    first = [a[:, :past] for a in (*starts, scale, d_y)]
    _, _, d_before = form(x[:, :past], weights, before, *first, jnp.zeros_like(d_final))
    size = jax.lax.axis_size(time)
    back = jax.lax.ppermute(d_before, time, [(i + 1, i) for i in range(size - 1)])
    is_last = jax.lax.axis_index(time) == size - 1
    d_final = jnp.where(is_last, d_final, jnp.where(_ends_segment(starts, past), 0, back))
    d_x, d_weights, d_recent = form(x, weights, before, *starts, scale, d_y, d_final)
    return d_x, d_weights, _of(time, d_recent, 0)


def _tail(x: jax.Array, past: int, starts: Sequence[jax.Array]) -> jax.Array:
    """The last normalized inputs of a shard, zero where they are not of its last segment."""
    tail = rms_norm(x[:, x.shape[1] - past :], native=False)
    return jnp.where(_ends_segment(starts, past), 0, tail)


def _ends_segment(starts: Sequence[jax.Array], past: int) -> jax.Array:
    """``[B, past, 1]``: a segment starts after this token of the shard's last ones."""
    if not starts:
        return jnp.zeros((1, past, 1), bool)
    late = starts[0][:, starts[0].shape[1] - past :].astype(jnp.int32)
    after = jnp.flip(jnp.cumsum(jnp.flip(late, 1), axis=1), 1) - late
    return (after > 0)[..., None]


def _before(time: tuple[str, ...], tail: jax.Array, recent: jax.Array) -> jax.Array:
    """The inputs before a shard: those of the shard before, or of the whole sequence."""
    size = jax.lax.axis_size(time)
    sent = jax.lax.ppermute(tail, time, [(i, i + 1) for i in range(size - 1)])
    return jnp.where(jax.lax.axis_index(time) == 0, recent, sent)


def _of(time: tuple[str, ...], x: jax.Array, place: int) -> jax.Array:
    """`x` of the shard at `place`, on all devices."""
    mine = jnp.where(jax.lax.axis_index(time) == place, x, 0)
    return jax.lax.psum(mine, time)
