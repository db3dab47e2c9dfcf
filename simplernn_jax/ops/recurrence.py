"""The recurrence as one operation of JAX, by any method."""

import functools
from typing import Any

import jax

from simplernn_jax.array_types import RecurrentState
from simplernn_jax.ops.chunkwise import chunkwise, chunkwise_gradient, start_shapes
from simplernn_jax.ops.fused import fused, fused_gradient
from simplernn_jax.ops.implementations import VJP, Implementations
from simplernn_jax.ops.operation import apply, as_function, is_static, on_one_device
from simplernn_jax.ops.reset_state import reset_state
from simplernn_jax.ops.scan import RecurrenceInputs, recurrent_step, scan
from simplernn_jax.ops.sequence_sharding import partition_gradient, partition_recurrence


def recurrence(
    method: str, chunk_size: int | None, inputs: RecurrenceInputs
) -> tuple[jax.Array, RecurrentState]:
    """Run the recurrence with a resolved method.

    Args:
      method: ``"fused"``, ``"chunkwise"`` or ``"scan"``.
      chunk_size: tokens per chunk of ``"chunkwise"``; None chooses it.
      inputs: all axes are non-empty.
    """
    q, k, v, log_gate, state, reset = inputs
    if method == "scan":
        return scan(inputs)
    if q.shape[1] == 1 and method == "chunkwise":
        # One token: no chunk to fill.
        if reset is not None:
            state = reset_state(state, reset[:, 0])
        output, state = recurrent_step(q[:, 0], k[:, 0], v[:, 0], log_gate[:, 0], state)
        return output[:, None], state
    if method == "fused":
        # The C functions take float32 only. The state's dtype is the accumulation dtype.
        q, k, v = (x.astype(state.dtype) for x in (q, k, v))
    impls, vjp = _operation(method == "fused", reset is not None, chunk_size)
    if method == "chunkwise" and is_static(q.shape) and on_one_device():
        shapes = (*start_shapes(q.shape, v.shape[-1], chunk_size), state.shape)
        vjp = _vjp_from_starts(reset is not None, chunk_size, shapes, state.dtype)
    arrays = inputs._replace(q=q, k=k, v=v).arrays()
    output, state = apply(impls, arrays, [v, state], vjp)
    return output.astype(inputs.v.dtype), state


@functools.cache
def _operation(has_c: bool, has_reset: bool, chunk_size: int | None) -> tuple[Implementations, VJP]:
    def default(*arrays: Any) -> Any:
        inputs = RecurrenceInputs(*arrays)
        return chunkwise(inputs, chunk_size) if is_static(inputs.q.shape) else scan(inputs)

    def reference(*arrays: Any) -> Any:
        return scan(RecurrenceInputs(*arrays))

    def default_in_c(*arrays: Any) -> Any:
        return fused(RecurrenceInputs(*arrays))

    def gradient(*arrays: Any) -> Any:
        inputs, (d_output, d_final) = RecurrenceInputs(*arrays[:-2]), arrays[-2:]
        if is_static(inputs.q.shape):
            return chunkwise_gradient(inputs, d_output, d_final, chunk_size)
        _, vjp = jax.vjp(lambda *floating: reference(*floating, inputs.reset), *inputs[:5])
        return vjp((d_output, d_final))

    def gradient_in_c(*arrays: Any) -> Any:
        return fused_gradient(RecurrenceInputs(*arrays[:-2]), *arrays[-2:])

    rule = partition_recurrence(has_reset)
    impls = Implementations(default, default_in_c if has_c else None, reference, rule)
    rule = partition_gradient(as_function(impls), has_reset)
    bwd = Implementations(gradient, gradient_in_c if has_c else None, partitioning_rule=rule)
    return impls, VJP(bwd)


@functools.cache
def _vjp_from_starts(
    has_reset: bool, chunk_size: int | None, shapes: tuple[tuple[int, ...], ...], dtype: Any
) -> VJP:
    """Build the VJP used on one device; it saves the chunk-start states."""

    def fwd(*arrays: Any) -> Any:
        output, final, *starts = chunkwise(RecurrenceInputs(*arrays), chunk_size, with_starts=True)
        return output, final, *starts, final

    def bwd(*arrays: Any) -> Any:
        inputs, others = RecurrenceInputs(*arrays[: 5 + has_reset]), arrays[5 + has_reset :]
        *starts, final, d_output, d_final = others
        return chunkwise_gradient(inputs, d_output, d_final, chunk_size, starts, final)

    types = tuple((shape, dtype) for shape in shapes)
    return VJP(Implementations(bwd), Implementations(fwd), types)
