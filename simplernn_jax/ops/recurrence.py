"""The recurrence as one operation of JAX, whichever way it is computed."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax

from simplernn_jax.array_types import HeadState
from simplernn_jax.ops.chunkwise import (
    chunkwise,
    chunkwise_gradient,
    chunkwise_with_starts,
    starts_of,
)
from simplernn_jax.ops.fused import fused, fused_gradient
from simplernn_jax.ops.operation import Forms, Gradient, apply, evaluate, on_one_device
from simplernn_jax.ops.reset_state import reset_state
from simplernn_jax.ops.scan import recurrent_step, scan
from simplernn_jax.ops.sequence_sharding import partition_gradient, partition_recurrence


def recurrence(
    method: str,
    chunk_size: int | None,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_gate: jax.Array,
    clear: jax.Array | None,
    state: HeadState,
) -> tuple[jax.Array, HeadState]:
    """Compute the recurrence by a method that is available.

    Args:
      method: ``"fused"``, ``"chunkwise"`` or ``"scan"``.
      chunk_size: of ``"chunkwise"``; None chooses it.
      q: ``[B, T, H, K]``; k, v and log_gate likewise, as in `gated_linear_recurrence`.
      clear: ``[B, T]`` bool, True where the state is reset before the token; or None.
      state: ``[B, H, K, V]`` before the first token; sums are of its dtype. No axis is empty.
    """
    if method == "scan":
        return scan(q, k, v, log_gate, state, clear)
    if q.shape[1] == 1 and method == "chunkwise":
        # One token: no chunk to fill.
        if clear is not None:
            state = reset_state(state, clear[:, 0])
        output, state = recurrent_step(q[:, 0], k[:, 0], v[:, 0], log_gate[:, 0], state)
        return output[:, None], state
    if method == "fused":
        # C has no bfloat16. Sums are of the state's dtype in any form.
        q, k, out = q.astype(state.dtype), k.astype(state.dtype), v.astype(state.dtype)
    else:
        out = v
    forms, gradient = _operation(method == "fused", clear is not None, chunk_size)
    inputs = [q, k, out, log_gate, state, *([] if clear is None else [clear])]
    if method == "chunkwise" and not _is_symbolic(q.shape) and on_one_device():
        starts = starts_of(q.shape, v.shape[-1], chunk_size)
        shapes = [*starts, state.shape]
        gradient = _gradient_from_starts(clear is not None, chunk_size, tuple(shapes), state.dtype)
    output, state = apply(forms, inputs, [out, state], gradient)
    return output.astype(v.dtype), state


@functools.cache
def _operation(has_c: bool, has_clear: bool, chunk_size: int | None) -> tuple[Forms, Gradient]:
    def forward(q: Any, k: Any, v: Any, log_gate: Any, state: Any, *clear: Any) -> Any:
        if _is_symbolic(q.shape):
            return pure(q, k, v, log_gate, state, *clear)
        return chunkwise(q, k, v, log_gate, state, _optional(clear), chunk_size)

    def pure(q: Any, k: Any, v: Any, log_gate: Any, state: Any, *clear: Any) -> Any:
        return scan(q, k, v, log_gate, state, _optional(clear))

    def forward_in_c(q: Any, k: Any, v: Any, log_gate: Any, state: Any, *clear: Any) -> Any:
        return fused(q, k, v, log_gate, state, _optional(clear))

    def gradient(*args: Any) -> Any:
        *inputs, d_output, d_final = args
        clears = inputs[5:]
        if _is_symbolic(inputs[0].shape):
            _, vjp = jax.vjp(lambda *floating: pure(*floating, *clears), *inputs[:5])
            return vjp((d_output, d_final))
        q, k, v, log_gate, state = inputs[:5]
        clear = _optional(clears)
        return chunkwise_gradient(q, k, v, log_gate, state, clear, d_output, d_final, chunk_size)

    def gradient_in_c(*args: Any) -> Any:
        *inputs, d_output, d_final = args
        q, k, v, log_gate, state = inputs[:5]
        return fused_gradient(q, k, v, log_gate, state, _optional(inputs[5:]), d_output, d_final)

    forms = Forms(forward, forward_in_c if has_c else None, pure)
    reverse = Forms(gradient, gradient_in_c if has_c else None)
    of_gradient = partition_gradient(evaluate(forms), has_clear)
    return (
        dataclasses.replace(forms, partitioned=partition_recurrence(has_clear)),
        Gradient(dataclasses.replace(reverse, partitioned=of_gradient)),
    )


@functools.cache
def _gradient_from_starts(
    has_clear: bool, chunk_size: int | None, shapes: tuple[tuple[int, ...], ...], dtype: Any
) -> Gradient:
    """The gradient of one device, which keeps the states at the chunks' starts."""

    def forward(q: Any, k: Any, v: Any, log_gate: Any, state: Any, *clear: Any) -> Any:
        output, final, *starts = chunkwise_with_starts(
            q, k, v, log_gate, state, _optional(clear), chunk_size
        )
        return output, final, *starts, final

    def gradient(*args: Any) -> Any:
        (q, k, v, log_gate, state), others = args[:5], args[5:]
        clear, others = others[:has_clear], others[has_clear:]
        *starts, final, d_output, d_final = others
        cotangents = (d_output, d_final)
        return chunkwise_gradient(
            q, k, v, log_gate, state, _optional(clear), *cotangents, chunk_size, starts, final
        )

    extras = tuple((shape, dtype) for shape in shapes)
    return Gradient(Forms(gradient), Forms(forward), extras)


def _optional(clear: Sequence[jax.Array]) -> jax.Array | None:
    return clear[0] if clear else None


def _is_symbolic(shape: Sequence[Any]) -> bool:
    """Whether `shape` has a dimension that `jax.export` leaves open."""
    return not all(isinstance(size, int) for size in shape)
