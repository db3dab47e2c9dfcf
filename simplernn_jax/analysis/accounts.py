"""Where the outputs of every layer come from, checked against what the layer computed."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from simplernn_jax.analysis.attention_map import attention_map, read_values
from simplernn_jax.analysis.recording import Record, find_mixers, record
from simplernn_jax.analysis.softmax_map import seen_tokens, softmax_map
from simplernn_jax.array_types import ModelState, SegmentIds, Values
from simplernn_jax.models import LanguageModel, SimpleRNN
from simplernn_jax.models.attention import Attention
from simplernn_jax.ops import gated_linear_recurrence
from simplernn_jax.ops.sliding_attention import attend

LARGEST_ERROR = 1e-5
"""Of a map, relative to the output that it reproduces in float32."""


class LayerAccount(NamedTuple):
    """Where the output of one layer's recurrence or attention comes from."""

    weights: jax.Array
    """``[B, H, T, T]``: A_tj at row t, column j; 0 for j > t and between segments."""
    values: Values
    """``[B, T, H, V]``."""
    from_state: Values
    """``[B, T, H, V]``: the part of the output that the initial state gives, which for attention
    is its cache."""
    output: Values
    """``[B, T, H, V]``: weights times values plus `from_state`."""
    operator_error: jax.Array
    """RMS(output - o) / RMS(o) where o is what the operator makes of the same inputs in float32:
    `scan`, which defines the recurrence, or `attend`."""
    layer_error: jax.Array
    """The same for the layer's output, after norm, gate and projection, beside the model's own."""


def account_for(
    mixer: SimpleRNN | Attention, call: Record, segment_ids: SegmentIds | None = None
) -> LayerAccount:
    """Takes one recorded call of a mixer apart and checks that the parts make the whole."""
    if isinstance(mixer, SimpleRNN):
        return _of_recurrence(mixer, call, segment_ids)
    return _of_attention(mixer, call, segment_ids)


def account_for_layers(
    model: LanguageModel, tokens: np.ndarray, state: ModelState
) -> tuple[LayerAccount, ...]:
    """`account_for` of every layer while it reads [T] tokens after `state`, which has one row.

    Returns:
      One account per layer, numpy arrays with B = 1.
    """
    graph, params = nnx.split(model)

    @jax.jit
    def run(params: nnx.State, tokens: jax.Array, state: ModelState) -> tuple[LayerAccount, ...]:
        model = nnx.merge(graph, params)
        calls = record(model, tokens, state).layers
        return tuple(map(account_for, find_mixers(model), calls))

    # An accelerator's default would round the factors of products to fewer bits.
    with jax.default_matmul_precision("highest"):
        results = run(params, np.asarray(tokens, np.int32)[None], state)
    accounts: tuple[LayerAccount, ...] = jax.device_get(results)
    return accounts


def is_exact(account: LayerAccount, is_float32: bool) -> bool:
    """Whether no error is above `LARGEST_ERROR`; one that is not a number is.

    Args:
      account: of one layer.
      is_float32: whether the model computes and keeps its state in float32. If not, it rounds
        the layer's output where the account does not, and only the operator's error counts.
    """
    errors = [account.operator_error, account.layer_error]
    return all(bool(error <= LARGEST_ERROR) for error in errors[: 2 if is_float32 else 1])


def _of_recurrence(mixer: SimpleRNN, call: Record, segment_ids: SegmentIds | None) -> LayerAccount:
    (q, k, v, log_gate), output_gate = mixer.cell.project(call.inputs)
    attention = attention_map(q, k, log_gate, segment_ids=segment_ids)
    from_values, from_state = read_values(attention, v, call.state)
    output = from_values + from_state
    expected, _ = gated_linear_recurrence(
        q,
        k,
        v.astype(output.dtype),
        log_gate,
        initial_state=call.state,
        segment_ids=segment_ids,
        method="scan",
    )
    layer_output = mixer.cell.combine(output.astype(v.dtype), output_gate)
    return LayerAccount(
        weights=attention.weights,
        values=v.astype(output.dtype),
        from_state=from_state,
        output=output,
        operator_error=_relative_error(output, expected),
        layer_error=_relative_error(layer_output, call.output),
    )


def _of_attention(mixer: Attention, call: Record, segment_ids: SegmentIds | None) -> LayerAccount:
    projected, output_gate = mixer.projections(call.inputs)
    seen = seen_tokens(mixer, projected, call.state, segment_ids)
    weights = softmax_map(seen)
    slots = mixer.context
    from_state, from_values = (
        jnp.einsum("bhts,bshv->bthv", weights[..., part], seen.values[:, part])
        for part in (slice(slots), slice(slots, None))
    )
    output = from_values + from_state
    expected = attend(seen.queries, seen.keys, seen.values, seen.mask)
    layer_output = mixer.combine(output.astype(mixer.dtype), output_gate)
    return LayerAccount(
        weights=weights[..., slots:],
        values=seen.values[:, slots:],
        from_state=from_state,
        output=output,
        operator_error=_relative_error(output, expected),
        layer_error=_relative_error(layer_output, call.output),
    )


def _relative_error(actual: jax.Array, expected: jax.Array) -> jax.Array:
    """RMS of the difference over RMS of what was expected; 0 where both are 0."""
    dtype = jnp.promote_types(expected.dtype, jnp.float32)
    actual, expected = actual.astype(dtype), expected.astype(dtype)
    error = jnp.sqrt(jnp.mean((actual - expected) ** 2))
    scale = jnp.sqrt(jnp.mean(expected**2))
    return error / jnp.maximum(scale, jnp.finfo(dtype).tiny)
