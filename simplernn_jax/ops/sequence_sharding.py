"""The recurrence with operands that are sharded under `jit`: over batch, heads and time.

Sequences and heads are independent. Sequence shards are run at once, each from a zero state; their
final states and decays, K (V + 1) numbers of each head, are gathered, and give every device the
state that enters its shard. For the gradient, what goes back into the state is gathered likewise.
K and V are not sharded.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from simplernn_jax.ops.operation import Form
from simplernn_jax.ops.partitioning import Partitioned, axis_names

_INPUTS = ("b t h k", "b t h k", "b t h v", "b t h k", "b h k v")
"""Axes of q, k, v, log_gate and initial_state, which `clear` may follow."""
_CLEAR = "b t"
_RESULTS = ("b t h v", "b h k v")


def partition_recurrence(has_clear: bool) -> Partitioned:
    """Partition (q, k, v, log_gate, state[, clear]) to (output, final state)."""
    inputs = (*_INPUTS, _CLEAR) if has_clear else _INPUTS
    return _Recurrence(inputs, _RESULTS, ("k", "v"))


def partition_gradient(forward: Form, has_clear: bool) -> Partitioned:
    """Partition (inputs, cotangents of the results) to the cotangents of the first five inputs.

    Args:
      forward: the recurrence.
      has_clear: whether `clear` is among the inputs.
    """
    inputs = (*_INPUTS, _CLEAR, *_RESULTS) if has_clear else (*_INPUTS, *_RESULTS)
    return _Gradient(inputs, _INPUTS, ("k", "v"), forward)


@dataclasses.dataclass(frozen=True)
class _Recurrence(Partitioned):
    def shard_form(self, form: Form, over: Mapping[str, Any]) -> Form:
        return _TimeShards(axis_names(over["t"]), form) if over.get("t") else form


@dataclasses.dataclass(frozen=True)
class _Gradient(Partitioned):
    forward: Form

    def shard_form(self, form: Form, over: Mapping[str, Any]) -> Form:
        if not over.get("t"):
            return form
        return _TimeShardsGradient(axis_names(over["t"]), self.forward, form)


@dataclasses.dataclass(frozen=True)
class _TimeShards:
    """`form` over a device's sequence shard; the final state is that of the whole sequence."""

    axes: tuple[str, ...]
    form: Form

    def __call__(
        self, q: Any, k: Any, v: Any, log_gate: Any, initial_state: Any, *clear: Any
    ) -> list[jax.Array]:
        output, state = self.form(q, k, v, log_gate, jnp.zeros_like(initial_state), *clear)
        incoming, final = states_between(self.axes, log_gate, clear, state, initial_state)
        read = jnp.einsum("bthk,bhkv->bthv", _decayed(q, log_gate, clear), incoming)
        return [(output + read).astype(v.dtype), final]


@dataclasses.dataclass(frozen=True)
class _TimeShardsGradient:
    axes: tuple[str, ...]
    forward: Form
    gradient: Form

    def __call__(
        self, q: Any, k: Any, v: Any, log_gate: Any, initial_state: Any, *others: Any
    ) -> list[jax.Array]:
        *clear, d_output, d_final = others
        inputs = (q, k, v, log_gate)
        _, state = self.forward(*inputs, jnp.zeros_like(initial_state), *clear)
        incoming, _ = states_between(self.axes, log_gate, clear, state, initial_state)
        d_state = jnp.einsum(
            "bthk,bthv->bhkv", _decayed(q, log_gate, clear), d_output.astype(state.dtype)
        )
        back, d_initial = states_between(
            self.axes, log_gate, clear, d_state, d_final, backwards=True
        )
        gradients = self.gradient(*inputs, incoming, *clear, d_output, back)
        return [*gradients[:4], d_initial]


def states_between(
    axes: Sequence[str],
    log_gate: jax.Array,
    clear: Sequence[jax.Array],
    state: jax.Array,
    before: jax.Array,
    *,
    backwards: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """What enters each sequence shard, and what leaves the last, of ``S' = decay * S + state``.

    Args:
      axes: mesh axes over which T is sharded.
      log_gate: of this device's shard, ``[B, T, H, K]``.
      clear: nothing, or ``[B, T]`` bool: the state is reset before these tokens.
      state: what the shard adds, ``[B, H, K, V]``.
      before: what enters the first shard; the last one, if `backwards`.
      backwards: go through the shards from the last to the first.
    """
    decay = jnp.exp(jnp.sum(log_gate.astype(state.dtype), axis=1))
    if clear:
        decay = jnp.where(jnp.any(clear[0], axis=1)[:, None, None], 0, decay)
    states, decays = jax.lax.all_gather((state, decay), tuple(axes))
    here, entering = jax.lax.axis_index(tuple(axes)), before
    places = range(states.shape[0])
    for place in reversed(places) if backwards else places:
        entering = jnp.where(here == place, before, entering)
        before = decays[place][..., None] * before + states[place]
    return entering, before


def _decayed(q: jax.Array, log_gate: jax.Array, clear: Sequence[jax.Array]) -> jax.Array:
    """``q_i e^{b_i}`` at the tokens that read the state before the shard; 0 elsewhere."""
    dtype = log_gate.dtype
    if not clear:
        return q.astype(dtype) * jnp.exp(jnp.cumsum(log_gate, axis=1))
    reads = (jnp.cumsum(clear[0], axis=1) == 0)[..., None, None]
    decay = jnp.exp(jnp.cumsum(jnp.where(reads, log_gate, 0), axis=1))
    return jnp.where(reads, q.astype(dtype) * decay, 0)
