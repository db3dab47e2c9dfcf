"""Outputs as sums over earlier tokens: of every layer, and of one prediction.

A layer's output is its attention map times its values, plus the part of the initial state; how
exactly is measured. A prediction is attributed through all layers by gradient times input, and in
each layer by the shares of its map.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from simplernn_jax.analysis.attention_map import (
    apply_map,
    attention_inputs,
    attention_map,
    softmax_map,
)
from simplernn_jax.analysis.recording import (
    Mixer,
    Record,
    find_mixers,
    record,
    recurrence_inputs,
    recurrent_state,
)
from simplernn_jax.array_types import ModelState, RecurrentState, SegmentIds, Values
from simplernn_jax.models import LanguageModel, SimpleRNN
from simplernn_jax.models.mixers.attention import Attention, KVCache
from simplernn_jax.ops import gated_linear_recurrence
from simplernn_jax.ops.attention import attend
from simplernn_jax.ops.checks import accumulator_dtype

MAX_ERROR = 1e-5
"""Largest relative error of an exact map in float32."""


class LayerDecomposition(NamedTuple):
    """Output of one layer's recurrence or attention as a sum over tokens."""

    weights: jax.Array
    """``[B, H, T, T]``: A_tj at row t, column j; 0 for j > t and between segments."""
    values: Values
    """``[B, T, H, V]``."""
    from_state: Values
    """``[B, T, H, V]``: part of the output due to the initial state, or to attention's cache."""
    output: Values
    """``[B, T, H, V]``: weights times values plus `from_state`."""
    operator_error: jax.Array
    """RMS(output - o) / RMS(o), where o is the operator's float32 output from the same inputs:
    `scan`, which defines the recurrence, or `attend`."""
    layer_error: jax.Array
    """Relative error of the layer's output after norm, gate and projection, against the model's."""


def decompose_layer(
    mixer: Mixer, call: Record, segment_ids: SegmentIds | None = None
) -> LayerDecomposition:
    """Decompose one recorded call of a mixer and measure how exact the sum is.

    Args:
      mixer: the layer's, one of `find_mixers`.
      call: of this mixer, one of the layers of `record`.
      segment_ids: int32 ``[B, T]``, as recorded.
    """
    if isinstance(mixer, Attention):
        projected, output_gate = mixer.project_inputs(call.inputs)
        parts = _decompose_attention(mixer, projected, call.state, segment_ids)
        dtype = mixer.dtype
    else:
        projected, output_gate = recurrence_inputs(mixer, call, segment_ids)
        parts = _decompose_recurrence(projected, recurrent_state(call.state), segment_ids)
        dtype = projected[2].dtype
    projections = mixer.cell if isinstance(mixer, SimpleRNN) else mixer
    output = parts.from_values + parts.from_state
    layer_output = projections.project_outputs(output.astype(dtype), output_gate)
    return LayerDecomposition(
        weights=parts.weights,
        values=parts.values,
        from_state=parts.from_state,
        output=output,
        operator_error=_relative_error(output, parts.expected),
        layer_error=_relative_error(layer_output, call.output),
    )


class _Parts(NamedTuple):
    weights: jax.Array
    values: Values
    from_values: Values
    from_state: Values
    expected: Values


def decompose_layers(
    model: LanguageModel, tokens: np.ndarray, state: ModelState
) -> tuple[LayerDecomposition, ...]:
    """Decompose every layer's outputs for [T] tokens after `state`, which has batch size 1.

    Returns:
      One decomposition per layer, numpy arrays with B = 1.
    """
    graph, params = nnx.split(model)

    @jax.jit
    def run(
        params: nnx.State, tokens: jax.Array, state: ModelState
    ) -> tuple[LayerDecomposition, ...]:
        model = nnx.merge(graph, params)
        calls = record(model, tokens, state).layers
        return tuple(map(decompose_layer, find_mixers(model), calls))

    # By default an accelerator rounds the operands of a matmul to fewer bits.
    with jax.default_matmul_precision("highest"):
        results = run(params, np.asarray(tokens, np.int32)[None], state)
    layers: tuple[LayerDecomposition, ...] = jax.device_get(results)
    return layers


def is_exact(layer: LayerDecomposition, is_float32: bool) -> bool:
    """Return whether no error exceeds `MAX_ERROR` or is NaN.

    Args:
      layer: decomposition of one layer.
      is_float32: whether the model computes and keeps its state in float32. Otherwise the layer
        rounds its output where the decomposition does not, and only the operator's error counts.
    """
    errors = [layer.operator_error, *([layer.layer_error] if is_float32 else [])]
    return all(bool(error <= MAX_ERROR) for error in errors)


def _decompose_recurrence(
    projected: tuple[jax.Array, ...], state: RecurrentState, segment_ids: SegmentIds | None
) -> _Parts:
    q, k, v, log_gate = projected
    attention = attention_map(q, k, log_gate, segment_ids=segment_ids)
    values = v.astype(attention.weights.dtype)
    options: dict[str, Any] = {"initial_state": state, "segment_ids": segment_ids, "method": "scan"}
    expected, _ = gated_linear_recurrence(q, k, values, log_gate, **options)
    return _Parts(attention.weights, values, *apply_map(attention, values, state), expected)


def _decompose_attention(
    mixer: Attention,
    projected: tuple[jax.Array, ...],
    cache: KVCache,
    segment_ids: SegmentIds | None,
) -> _Parts:
    inputs = attention_inputs(mixer, projected, cache, segment_ids)
    weights = softmax_map(inputs)
    cached, new = slice(mixer.context), slice(mixer.context, None)
    from_state, from_values = (
        jnp.einsum("bhts,bshv->bthv", weights[..., part], inputs.values[:, part])
        for part in (cached, new)
    )
    expected = attend(inputs.queries, inputs.keys, inputs.values, inputs.mask)
    return _Parts(weights[..., new], inputs.values[:, new], from_values, from_state, expected)


def _relative_error(actual: jax.Array, expected: jax.Array) -> jax.Array:
    """Return RMS(actual - expected) / RMS(expected); 0 if both are 0."""
    dtype = accumulator_dtype(expected)
    actual, expected = actual.astype(dtype), expected.astype(dtype)
    error = jnp.sqrt(jnp.mean((actual - expected) ** 2))
    scale = jnp.sqrt(jnp.mean(expected**2))
    return error / jnp.maximum(scale, jnp.finfo(dtype).tiny)


class Contributions(NamedTuple):
    """Contribution of each token and of the initial state, which holds all earlier tokens."""

    tokens: np.ndarray
    """float64 [n]."""
    state: float


def gradient_contributions(
    model: LanguageModel, tokens: np.ndarray, state: ModelState, target: int
) -> Contributions:
    """Compute gradient times input of log p(target) after `tokens`, in nats.

    A token's embedding times its gradient: the loss of log-probability, to first order, if the
    embedding were scaled to zero (Shrikumar et al. 2016, arXiv:1605.01713); likewise for the
    initial state. The contributions need not sum to log p.

    `tokens` are [n] ids, n at least 1, and `target` is the id predicted after them; `state`, before
    them, has batch size 1.
    """
    graph, params = nnx.split(model)

    @jax.jit
    def gradients(
        params: nnx.State, tokens: jax.Array, state: ModelState, target: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        model = nnx.merge(graph, params)

        def log_probability(shift: jax.Array, state: ModelState) -> jax.Array:
            hidden = record(model, tokens, state, shift=shift).hidden
            return jax.nn.log_softmax(model.logits(hidden[0, -1]))[target]

        embeddings = model.embedding(tokens)
        # A state may hold counters, which have no gradient.
        gradient = jax.grad(log_probability, argnums=(0, 1), allow_int=True)
        by_token, by_state = gradient(jnp.zeros_like(embeddings), state)
        products = [
            jnp.sum(slope.astype(jnp.float32) * x.astype(jnp.float32))
            for slope, x in zip(jax.tree.leaves(by_state), jax.tree.leaves(state), strict=True)
            if jnp.issubdtype(x.dtype, jnp.floating)
        ]
        return jnp.sum(by_token * embeddings, axis=-1)[0], sum(products, jnp.zeros(()))

    by_token, by_state = gradients(
        params, np.asarray(tokens, np.int32)[None], state, np.int32(target)
    )
    return Contributions(np.asarray(by_token, np.float64), float(by_state))


def map_contributions(layer: LayerDecomposition, position: int) -> Contributions:
    """Compute each token's share of one output of a layer's mixer; all shares sum to 1.

    The share of a summand of y_t = sum_j A_tj v_j + (part of the initial state) is its projection
    on y_t, ``<A_tj v_j, y_t> / <y_t, y_t>``, averaged over the heads. A negative share points the
    other way. `position` is the t of the output; `layer` has B = 1.
    """
    weights = np.asarray(layer.weights[0, :, position], np.float64)  # [H, T]
    values = np.asarray(layer.values[0], np.float64)  # [T, H, V]
    output = np.asarray(layer.output[0, position], np.float64)  # [H, V]
    from_state = np.asarray(layer.from_state[0, position], np.float64)
    squares = np.maximum(np.sum(output**2, axis=-1), np.finfo(np.float64).tiny)  # [H]
    projections = np.einsum("thv,hv->ht", values, output) / squares[:, None]
    state = np.sum(from_state * output, axis=-1) / squares
    return Contributions(np.mean(weights * projections, axis=0), float(np.mean(state)))
