"""The recurrence as one operation of JAX, by any method."""

import functools
from typing import Any

import jax

from simplernn_jax.array_types import HeadState
from simplernn_jax.ops.chunkwise import chunkwise, chunkwise_gradient, start_shapes
from simplernn_jax.ops.forms import Forms, Gradient
from simplernn_jax.ops.fused import fused, fused_gradient
from simplernn_jax.ops.operation import apply, evaluate, is_static, on_one_device
from simplernn_jax.ops.reset_state import reset_state
from simplernn_jax.ops.scan import Inputs, recurrent_step, scan
from simplernn_jax.ops.sequence_sharding import partition_gradient, partition_recurrence


def recurrence(method: str, chunk_size: int | None, inputs: Inputs) -> tuple[jax.Array, HeadState]:
    """Compute the recurrence by a method that is available.

    Args:
      method: ``"fused"``, ``"chunkwise"`` or ``"scan"``.
      chunk_size: of ``"chunkwise"``; None chooses it.
      inputs: no axis is empty.
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
        # The C functions take float32 only. Sums are of the state's dtype in any form.
        q, k, v = (x.astype(state.dtype) for x in (q, k, v))
    forms, gradient = _operation(method == "fused", reset is not None, chunk_size)
    if method == "chunkwise" and is_static(q.shape) and on_one_device():
        shapes = (*start_shapes(q.shape, v.shape[-1], chunk_size), state.shape)
        gradient = _gradient_from_starts(reset is not None, chunk_size, shapes, state.dtype)
    arrays = inputs._replace(q=q, k=k, v=v).arrays()
    output, state = apply(forms, arrays, [v, state], gradient)
    return output.astype(inputs.v.dtype), state


@functools.cache
def _operation(has_c: bool, has_reset: bool, chunk_size: int | None) -> tuple[Forms, Gradient]:
    def forward(*arrays: Any) -> Any:
        inputs = Inputs(*arrays)
        return chunkwise(inputs, chunk_size) if is_static(inputs.q.shape) else scan(inputs)

    def pure(*arrays: Any) -> Any:
        return scan(Inputs(*arrays))

    def forward_in_c(*arrays: Any) -> Any:
        return fused(Inputs(*arrays))

    def gradient(*arrays: Any) -> Any:
        inputs, (d_output, d_final) = Inputs(*arrays[:-2]), arrays[-2:]
        if is_static(inputs.q.shape):
            return chunkwise_gradient(inputs, d_output, d_final, chunk_size)
        _, vjp = jax.vjp(lambda *floating: pure(*floating, inputs.reset), *inputs[:5])
        return vjp((d_output, d_final))

    def gradient_in_c(*arrays: Any) -> Any:
        return fused_gradient(Inputs(*arrays[:-2]), *arrays[-2:])

    forms = Forms(forward, forward_in_c if has_c else None, pure, partition_recurrence(has_reset))
    partitioned = partition_gradient(evaluate(forms), has_reset)
    reverse = Forms(gradient, gradient_in_c if has_c else None, partitioned=partitioned)
    return forms, Gradient(reverse)


@functools.cache
def _gradient_from_starts(
    has_reset: bool, chunk_size: int | None, shapes: tuple[tuple[int, ...], ...], dtype: Any
) -> Gradient:
    """Make the gradient on one device, which keeps the states at the chunks' starts."""

    def forward(*arrays: Any) -> Any:
        output, final, *starts = chunkwise(Inputs(*arrays), chunk_size, with_starts=True)
        return output, final, *starts, final

    def gradient(*arrays: Any) -> Any:
        inputs, others = Inputs(*arrays[: 5 + has_reset]), arrays[5 + has_reset :]
        *starts, final, d_output, d_final = others
        return chunkwise_gradient(inputs, d_output, d_final, chunk_size, starts, final)

    extras = tuple((shape, dtype) for shape in shapes)
    return Gradient(Forms(gradient), Forms(forward), extras)
