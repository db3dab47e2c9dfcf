"""Gated linear recurrence as a pure function, with selectable implementations."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from simplernn_jax.array_types import Keys, LogGates, Queries, RecurrentState, SegmentIds, Values
from simplernn_jax.ops.checks import FLOATING, INTEGER, check_array, check_dtype, check_segment_ids
from simplernn_jax.ops.collectives import vary_like
from simplernn_jax.ops.dtypes import accumulator_dtype
from simplernn_jax.ops.intra_chunk import BLOCK
from simplernn_jax.ops.low_precision_state import low_precision_recurrence
from simplernn_jax.ops.native import supports_native
from simplernn_jax.ops.operation import is_static
from simplernn_jax.ops.recurrence import recurrence
from simplernn_jax.ops.scan import RecurrenceInputs, check_log_gate, recurrent_step

__all__ = ["gated_linear_recurrence", "recurrent_step", "segment_starts"]

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
    state_dtype: Any = None,
) -> tuple[Values, RecurrentState]:
    """Gated linear recurrence: ``S_t = diag(e^log_gate_t) S_{t-1} + k_t v_t^T, y_t = S_t^T q_t``.

    Args:
      q: queries ``[B, T, H, K]``. All arrays may be float16, bfloat16, float32 or float64; sums are
        float64 if q, k, v, log_gate or `state_dtype` is, else float32.
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
      state_dtype: storage dtype of the state, such as bfloat16; see `low_precision_recurrence`.
        None keeps the accumulation dtype. Not with symbolic shapes.

    Returns:
      ``(output, final_state)``: ``[B, T, H, V]`` in the dtype of v, and ``[B, H, K, V]`` in the
      accumulation dtype, or in `state_dtype`.

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
    if state_dtype is not None:
        check_dtype("state_dtype", state_dtype)
    q, k, v, log_gate = map(
        jnp.asarray, (q, k, v, log_gate)
    )  # without x64, float64 becomes float32
    batch, _, heads, key_dim = q.shape
    stored = () if state_dtype is None else (jax.dtypes.canonicalize_dtype(state_dtype),)
    dtype = accumulator_dtype(q, k, v, log_gate, *stored)
    method = _choose(method, chunk_size, dtype)
    check_log_gate(log_gate)
    log_gate = log_gate.astype(dtype)
    if initial_state is None:
        initial_state = jnp.zeros((batch, heads, key_dim, v.shape[-1]), dtype)
    initial_state = vary_like(initial_state, q, k, v, log_gate)
    if 0 in (*q.shape, v.shape[-1]):
        return jnp.zeros_like(v), initial_state.astype(state_dtype or dtype)
    reset = None if segment_ids is None else segment_starts(segment_ids)
    inputs = RecurrenceInputs(q, k, v, log_gate, initial_state, reset)
    run = functools.partial(recurrence, method, chunk_size)
    if state_dtype is not None:
        if not is_static(q.shape):
            raise ValueError(f"{state_dtype=}: must be None with symbolic shapes, got {q.shape}")
        return low_precision_recurrence(run, inputs, state_dtype)
    return run(inputs._replace(state=initial_state.astype(dtype)))


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


def segment_starts(segment_ids: jax.Array | np.ndarray) -> jax.Array:
    """Mark the tokens whose id differs from that of the token before, ``[B, T]`` bool.

    Raises:
      ValueError: `segment_ids` is not ``[B, T]``.
      TypeError: `segment_ids` is not of integers.
    """
    check_array("segment_ids", segment_ids, "B T", INTEGER)
    changed = segment_ids[:, 1:] != segment_ids[:, :-1]
    return jnp.pad(changed, ((0, 0), (1, 0)))[:, : segment_ids.shape[1]]
