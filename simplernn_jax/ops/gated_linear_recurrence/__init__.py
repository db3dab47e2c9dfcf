"""Gated linear recurrence as a pure function, with selectable implementations."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from simplernn_jax.array_types import Keys, LogGates, Queries, RecurrentState, SegmentIds, Values
from simplernn_jax.ops.checks import FLOATING, accumulator_dtype, check_array, check_segment_ids
from simplernn_jax.ops.gated_linear_recurrence.chunkwise import BLOCK, chunkwise, chunkwise_gradient
from simplernn_jax.ops.gated_linear_recurrence.scan import (
    RecurrenceInputs,
    check_log_gate,
    recurrent_step,
    scan,
)
from simplernn_jax.ops.gated_linear_recurrence.sharding import partition
from simplernn_jax.ops.native import call_native, or_empty, supports_native
from simplernn_jax.ops.primitive import Operation, is_static, on_one_device, vary_like
from simplernn_jax.ops.segments import reset_state, segment_starts

__all__ = ["gated_linear_recurrence", "recurrent_step", "simple_rnn_recurrence"]

METHODS = ("auto", "fused", "chunkwise", "scan")


def gated_linear_recurrence(
    q: Queries,
    k: Keys,
    v: Values,
    log_gate: LogGates,
    *,
    initial_state: RecurrentState | None = None,
    segment_ids: SegmentIds | None = None,
    method: str = "auto",
    chunk_size: int | None = None,
) -> tuple[Values, RecurrentState]:
    """Gated linear recurrence: ``S_t = diag(e^log_gate_t) S_{t-1} + k_t v_t^T, y_t = S_t^T q_t``.

    Args:
      q: queries ``[B, T, H, K]``. All arrays may be float16, bfloat16, float32 or float64; sums are
        float64 if one of them is, else float32.
      k: keys ``[B, T, H, K]``.
      v: values ``[B, T, H, V]``.
      log_gate: logarithms of the forget gates ``[B, T, H, K]``, at most 0; ``"chunkwise"`` takes
        those below -16 as -16 (-75 in float64).
      initial_state: ``[B, H, K, V]``, of the first token's segment; None starts from zero.
      segment_ids: ``[B, T]`` integers; where the id changes from one token to the next, the state
        is reset to zero.
      method: ``"auto"``: fused if available, else chunkwise. ``"fused"``: C kernel, for float32 on
        a CPU with a C compiler; chunkwise if lowered for another platform. ``"chunkwise"``: matmuls
        over chunks of time, `recurrent_step` for T = 1. ``"scan"``: reference, also used for the
        symbolic shapes of `jax.export`.
      chunk_size: tokens per chunk, a power of two of at least 8; setting it selects
        ``"chunkwise"``. None chooses it from the shape.

    Returns:
      ``(output, final_state)``: ``[B, T, H, V]`` in the dtype of v, and ``[B, H, K, V]`` in the
      accumulation dtype.

    Raises:
      ValueError: wrong ranks, shapes that do not fit together, an unknown or unavailable
        method, a bad chunk size, or, where `log_gate` is not traced, one above 0.
      TypeError: wrong dtypes.
    """
    sizes = check_array("q", q, "B T H K")
    check_array("k", k, "B T H K", FLOATING, sizes)
    sizes = check_array("v", v, "B T H V", FLOATING, sizes)
    check_array("log_gate", log_gate, "B T H K", FLOATING, sizes)
    if initial_state is not None:
        check_array("initial_state", initial_state, "B H K V", FLOATING, sizes)
    check_segment_ids(segment_ids, sizes)
    # Without x64, float64 becomes float32.
    q, k, v, log_gate = map(jnp.asarray, (q, k, v, log_gate))
    batch, _, heads, key_dim = q.shape
    dtype = accumulator_dtype(q, k, v, log_gate)
    method = _choose(method, chunk_size, dtype)
    check_log_gate(log_gate)
    log_gate = log_gate.astype(dtype)
    if initial_state is None:
        initial_state = jnp.zeros((batch, heads, key_dim, v.shape[-1]), dtype)
    initial_state = vary_like(jnp.asarray(initial_state, dtype), q, k, v, log_gate)
    if 0 in (*q.shape, v.shape[-1]):
        return jnp.zeros_like(v), initial_state
    reset = None if segment_ids is None else segment_starts(segment_ids)
    inputs = RecurrenceInputs(q, k, v, log_gate, initial_state, reset)
    if method == "scan":
        return scan(inputs)
    if q.shape[1] == 1 and method == "chunkwise":
        # One token: no chunk to fill.
        if reset is not None:
            initial_state = reset_state(initial_state, reset[:, 0])
        output, state = recurrent_step(q[:, 0], k[:, 0], v[:, 0], log_gate[:, 0], initial_state)
        return output[:, None], state
    if method == "fused":
        # The C functions take float32 only.
        inputs = inputs._replace(q=q.astype(dtype), k=k.astype(dtype), v=v.astype(dtype))
    # On one device, the gradient of chunks starts from saved states.
    saves_starts = method == "chunkwise" and is_static(q.shape) and on_one_device()
    operation = _operation(method == "fused", reset is not None, chunk_size, saves_starts)
    output, state = operation(*inputs.arrays())
    return output.astype(v.dtype), state


def simple_rnn_recurrence(
    q: Queries,
    k: Keys,
    v: Values,
    gate: Keys,
    key_bias: jax.Array,
    gate_bias: jax.Array,
    *,
    query_scale: float,
    initial_state: RecurrentState | None = None,
    segment_ids: SegmentIds | None = None,
    method: str = "auto",
) -> tuple[Values, RecurrentState]:
    """Compute the recurrence of what SimpleRNN's projections return.

    It is `gated_linear_recurrence` of ``query_scale q``, keys ``sigmoid(k + key_bias)``, `v` and
    gates ``sigmoid(gate + gate_bias)``; the biases are ``[H, K]``. The C kernel computes them
    within the recurrence.
    """
    sizes = check_array("q", q, "B T H K")
    sizes = check_array("v", v, "B T H V", FLOATING, sizes)
    for name, x, axes in (
        ("k", k, "B T H K"),
        ("gate", gate, "B T H K"),
        ("key_bias", key_bias, "H K"),
        ("gate_bias", gate_bias, "H K"),
        *([] if initial_state is None else [("initial_state", initial_state, "B H K V")]),
    ):
        check_array(name, x, axes, FLOATING, sizes)
    check_segment_ids(segment_ids, sizes)
    arrays = [jnp.asarray(x) for x in (q, k, v, gate, key_bias, gate_bias)]
    is_native = _choose(method, None, accumulator_dtype(*arrays)) == "fused" and on_one_device()
    is_native = is_native and all(x.dtype == jnp.float32 for x in arrays)
    if not is_native or 0 in (*q.shape, v.shape[-1]):
        inputs = _from_projections(query_scale, *arrays)
        options: dict[str, Any] = {"segment_ids": segment_ids, "method": method}
        return gated_linear_recurrence(*inputs, initial_state=initial_state, **options)
    if initial_state is None:
        initial_state = jnp.zeros((*q.shape[:1], *q.shape[2:], v.shape[-1]), jnp.float32)
    state = jnp.asarray(initial_state, jnp.float32)
    reset = [] if segment_ids is None else [segment_starts(segment_ids)]
    output, state = _simple_rnn_operation(query_scale, bool(reset))(*arrays, state, *reset)
    return output, state


def _from_projections(
    query_scale: float,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    gate: jax.Array,
    key_bias: jax.Array,
    gate_bias: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    gate = jax.nn.log_sigmoid(gate + gate_bias[None, None])
    return q * query_scale, jax.nn.sigmoid(k + key_bias[None, None]), v, gate


@functools.cache
def _simple_rnn_operation(query_scale: float, has_reset: bool) -> Operation:
    """Build the operation (q, k, v, gate, key_bias, gate_bias, state[, reset]) to (y, state)."""
    in_xla = _operation(False, has_reset, None, False)

    def default(*args: jax.Array) -> list[jax.Array]:
        return in_xla(*_from_projections(query_scale, *args[:6]), *args[6:])

    def fwd(*args: jax.Array) -> list[jax.Array]:
        _, keys, _, log_gates = _from_projections(query_scale, *args[:6])
        return [*default(*args), keys, jnp.exp(log_gates)]

    def bwd(*args: jax.Array) -> Sequence[jax.Array]:
        floating, reset, cotangents = args[:7], args[7 : 7 + has_reset], list(args[-2:])
        return jax.vjp(lambda *floating: default(*floating, *reset), *floating)[1](cotangents)

    def fwd_in_c(*args: jax.Array) -> Sequence[jax.Array]:
        q, k, v, gate, key_bias, gate_bias, state, *reset = args
        arguments = (q, k, v, gate, state, or_empty(reset[0] if reset else None, state))
        more = (key_bias, gate_bias, jnp.full((), query_scale, jnp.float32))
        return call_native("simplernn_forward", [v, state, k, gate], *arguments, *more)

    def bwd_in_c(*args: jax.Array) -> Sequence[jax.Array]:
        q, _, v, _, _, _, state, *reset, keys, gates, d_y, d_final = args
        arguments = (q, keys, v, gates, state, or_empty(reset[0] if reset else None, state))
        scale = jnp.full((), query_scale, jnp.float32)
        d_q, d_k, d_v, d_gate, d_state = call_native(
            "simplernn_backward", [q, keys, v, gates, state], *arguments, d_y, d_final, scale
        )
        return d_q, d_k, d_v, d_gate, _sum_of_tokens(d_k), _sum_of_tokens(d_gate), d_state

    # The biases have no batch axes.
    return Operation(
        default,
        lambda *args: fwd_in_c(*args)[:2],
        fwd=Operation(fwd, fwd_in_c, cpu_supports_vmap=False),
        bwd=Operation(bwd, bwd_in_c, cpu_supports_vmap=False),
        cpu_supports_vmap=False,
    )


def _sum_of_tokens(x: jax.Array) -> jax.Array:
    """Sum ``[B, T, H, K]`` to ``[H, K]``, in one order for any number of threads: as a matmul."""
    flat = x.reshape(-1, x.shape[-2] * x.shape[-1])
    ones = jnp.ones((1, len(flat)), x.dtype)
    return jnp.matmul(ones, flat, precision=jax.lax.Precision.HIGHEST).reshape(x.shape[2:])


def _choose(method: str, chunk_size: int | None, dtype: Any) -> str:
    """Resolve ``"auto"``, and check that the method is available."""
    if method not in METHODS:
        raise ValueError(f"method={method!r}: must be one of {', '.join(METHODS)}")
    if chunk_size is not None:
        if method not in ("auto", "chunkwise"):
            raise ValueError(f"chunk_size={chunk_size}: method={method!r} has no chunks")
        if chunk_size < BLOCK or chunk_size & (chunk_size - 1):
            raise ValueError(f"chunk_size={chunk_size}: must be a power of two of at least {BLOCK}")
        return "chunkwise"
    if method == "auto":
        return "fused" if supports_native(dtype) else "chunkwise"
    if method == "fused" and not supports_native(dtype):
        raise ValueError(
            f'method="fused": requires float32 (got {jnp.dtype(dtype)}), a CPU and a C compiler; '
            'use "auto" or "chunkwise"'
        )
    return method


@functools.cache
def _operation(
    has_c: bool, has_reset: bool, chunk_size: int | None, saves_starts: bool
) -> Operation:
    def default(*arrays: Any) -> Any:
        inputs = RecurrenceInputs(*arrays)
        return chunkwise(inputs, chunk_size) if is_static(inputs.q.shape) else scan(inputs)

    def reference(*arrays: Any) -> Any:
        return scan(RecurrenceInputs(*arrays))

    def gradient(*arrays: Any) -> Any:
        inputs, (d_output, d_final) = RecurrenceInputs(*arrays[:-2]), arrays[-2:]
        if not is_static(inputs.q.shape):
            return reference_gradient(*arrays)
        return chunkwise_gradient(inputs, d_output, d_final, chunk_size)

    def reference_gradient(*arrays: Any) -> Any:
        floating, reset = arrays[:5], arrays[5 : 5 + has_reset]
        return jax.vjp(lambda *floating: reference(*floating, *reset), *floating)[1](arrays[-2:])

    def with_starts(*arrays: Any) -> Any:
        output, final, starts = chunkwise(RecurrenceInputs(*arrays), chunk_size, with_starts=True)
        return output, final, starts, final

    def reference_with_starts(*arrays: Any) -> Any:
        return *reference(*arrays), *map(jax.lax.stop_gradient, with_starts(*arrays)[2:])

    def gradient_from_starts(*arrays: Any) -> Any:
        *inputs, starts, final, d_output, d_final = arrays
        return chunkwise_gradient(
            RecurrenceInputs(*inputs), d_output, d_final, chunk_size, starts, final
        )

    forward = Operation(default, _fused if has_c else None, reference)
    if saves_starts:
        bwd = Operation(gradient_from_starts, reference=reference_gradient)
        fwd = Operation(with_starts, reference=reference_with_starts)
        return dataclasses.replace(forward, fwd=fwd, bwd=bwd)
    bwd = Operation(gradient, _fused_gradient if has_c else None, reference_gradient)
    forward = dataclasses.replace(forward, bwd=bwd)
    on_shards, gradient_on_shards = partition(forward, bwd, has_reset)
    bwd = dataclasses.replace(bwd, partitioned=gradient_on_shards)
    return dataclasses.replace(forward, bwd=bwd, partitioned=on_shards)


# On a CPU without matrix units such as AMX, whose caches hold the state, chunks gain nothing: their
# cost (decays at every level, masks, copies) is most of the time there. Token by token, each entry
# of the state takes two fused multiply-adds and one multiplication (`cpu/fused.c`). Only the inputs
# are residuals; the gradient recomputes the states.


def _fused(*arrays: Any) -> Sequence[jax.Array]:
    """Compute `scan` of `RecurrenceInputs` in one C call; float32, `vmap` adds leading axes."""
    inputs = RecurrenceInputs(*arrays)
    return call_native("simplernn_forward", [inputs.v, inputs.state], *_in_c(inputs))


def _fused_gradient(*arrays: Any) -> Sequence[jax.Array]:
    """Map inputs and cotangents of the results to cotangents of the first five inputs."""
    inputs = RecurrenceInputs(*arrays[:-2])
    return call_native("simplernn_backward", inputs[:5], *_in_c(inputs), *arrays[-2:])


def _in_c(inputs: RecurrenceInputs) -> list[jax.Array]:
    q, k, v, log_gate, state, reset = inputs
    return [q, k, v, jnp.exp(log_gate), state, or_empty(reset, state)]
