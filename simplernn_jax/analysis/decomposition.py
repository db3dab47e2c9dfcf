"""Outputs as sums over earlier tokens: of every layer, and of one prediction.

A layer's output is its attention map times its values, plus the part of the initial state; how
exactly is measured. A recurrence has an exact implicit map. Unrolled, ``S_t = diag(g_t) S_{t-1} +
k_t v_t^T, y_t = S_t^T q_t`` is ::

    y_t = (q_t prod_{s<=t} g_s)^T S_0 + sum_{j<=t} A_tj v_j
    A_tj = sum_K q_t k_j prod_{j<s<=t} g_s

(gated linear attention: Yang et al. 2023, arXiv:2312.06635, section 4.1). Softmax attention has its
weights by definition. Memory grows with T^2: map an excerpt of a long text, given the state before
it.

A prediction is attributed through all layers by gradient times input, and in each layer by the
shares of its map.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from simplernn_jax.array_types import (
    Activations,
    Keys,
    LogGates,
    ModelState,
    Queries,
    Tokens,
    Values,
)
from simplernn_jax.errors import UserError
from simplernn_jax.models import (
    HGRN2,
    Attention,
    GatedLinearAttention,
    GLAState,
    LanguageModel,
    RetNet,
    SimpleRNN,
)
from simplernn_jax.models.mixers.attention import KVCache, cached_in_order
from simplernn_jax.ops import gated_linear_recurrence
from simplernn_jax.ops.attention import apply_rope, sliding_attention
from simplernn_jax.ops.checks import accumulator_dtype

MAX_ERROR = 1e-5
"""Largest relative error of an exact map in float32."""

Recurrent = SimpleRNN | GatedLinearAttention | RetNet | HGRN2
"""Mixers with the state of `gated_linear_recurrence`."""

Mixer = Recurrent | Attention


class Record(NamedTuple):
    """One call of one mixer."""

    inputs: Activations
    """``[B, T, D]``, in the compute dtype."""
    state: Any
    """Before the first token: a `RecurrentState`, a `GLAState`, or attention's `KVCache`."""
    output: Activations
    """``[B, T, D]``."""


def find_mixers(model: LanguageModel) -> list[Mixer]:
    """Return the mixer of every layer; raises `UserError` for one that cannot be decomposed."""
    mixers = [layer.mixer for layer in model.layers]
    for number, mixer in enumerate(mixers, 1):
        if not isinstance(mixer, Recurrent | Attention):
            raise UserError(
                f"layer {number} has the mixer {type(mixer).__name__}, which cannot be explained; "
                "use a model of simple_rnn, attention, gla, retnet or hgrn2"
            )
    return mixers


def recurrence_inputs(
    mixer: Recurrent, call: Record
) -> tuple[tuple[jax.Array, ...], jax.Array | None]:
    """Return (q, k, v, log_gate) of a recorded call, and the output gate's pre-activation."""
    if isinstance(mixer, SimpleRNN):
        return mixer.cell.project(call.inputs)
    inputs, output_gate, _ = mixer.project(call.inputs, call.state.convolutions, None)
    return inputs, output_gate


def record(
    model: LanguageModel, tokens: Tokens, state: ModelState | None = None
) -> tuple[tuple[Record, ...], ModelState]:
    """Run a forward pass on `tokens` ``[B, T]``; return the call of every mixer and the new state.

    `model` is unchanged; without a `state` it starts from zero.
    """
    if state is None:
        state = model.initial_state(tokens.shape[0])
    model = nnx.merge(*nnx.split(model))  # a copy for the taps; arrays are shared
    taps = [_Tap(mixer) for mixer in find_mixers(model)]
    for layer, tap in zip(model.layers, taps, strict=True):
        layer.mixer = tap
    _, state = model.hidden_states(tokens, state)
    return tuple(tap.record for tap in taps), state


class _Tap:
    """Wrapper of a mixer that records the call."""

    record: Record

    def __init__(self, mixer: Mixer):
        self._mixer = mixer

    def mix(self, x: Activations, state: Any, segment_ids: None) -> tuple[Activations, Any]:
        y, new_state = self._mixer(x, state, segment_ids)
        self.record = Record(x, state, y)
        return y, new_state


class LayerDecomposition(NamedTuple):
    """Output of one layer's recurrence or attention as a sum over tokens."""

    weights: jax.Array
    """``[B, H, T, T]``: A_tj at row t, column j; 0 for j > t."""
    values: Values
    """``[B, T, H, V]``."""
    from_state: Values
    """``[B, T, H, V]``: part of the output due to the initial state, or to attention's cache."""
    output: Values
    """``[B, T, H, V]``: weights times values plus `from_state`."""
    operator_error: jax.Array
    """RMS(output - o) / RMS(o), where o is the operator's float32 output from the same inputs:
    `scan`, which defines the recurrence, or `sliding_attention`."""
    layer_error: jax.Array
    """Relative error of the layer's output after norm, gate and projection, against the model's."""


def attention_map(q: Queries, k: Keys, log_gate: LogGates) -> tuple[jax.Array, Queries]:
    """Return the implicit attention of ``gated_linear_recurrence(q, k, v, log_gate)``, for any v.

    The recurrence is linear in its values and its state: unit vectors in their place give the
    weight of each.

    Args:
      q: queries, ``[B, T, H, K]``, float32, float64 or bfloat16.
      k: keys, ``[B, T, H, K]``.
      log_gate: logarithms of the gates, at most 0, ``[B, T, H, K]``.

    Returns:
      The weights A_tj, ``[B, H, T, T]``, and q_t times the product of gates 0 .. t, which reads the
      initial state, ``[B, T, H, K]``; both float32, or float64 if an input is.
    """
    batch, length, heads, key_dim = q.shape
    dtype = accumulator_dtype(q, k, log_gate)
    units = jnp.eye(length + key_dim, dtype=dtype)
    values = jnp.broadcast_to(units[None, :length, None], (batch, length, heads, len(units)))
    state = jnp.broadcast_to(units[None, None, length:], (batch, heads, key_dim, len(units)))
    inputs = q.astype(dtype), k.astype(dtype), values, log_gate.astype(dtype)
    outputs, _ = gated_linear_recurrence(*inputs, initial_state=state, method="scan")
    return jnp.moveaxis(outputs[..., :length], 2, 1), outputs[..., length:]


def decompose_layer(mixer: Mixer, call: Record) -> LayerDecomposition:
    """Decompose one recorded call of a mixer and measure how exact the sum is.

    Args:
      mixer: the layer's, one of `find_mixers`.
      call: of this mixer, one of the layers of `record`.
    """
    if isinstance(mixer, Attention):
        (q, k, v), output_gate = mixer.project_inputs(call.inputs)
        dtype = mixer.dtype
        weights, values, from_state, expected = _decompose_attention(mixer, q, k, v, call.state)
    else:
        (q, k, v, log_gate), output_gate = recurrence_inputs(mixer, call)
        state = call.state.recurrent if isinstance(call.state, GLAState) else call.state
        weights, state_queries = attention_map(q, k, log_gate)
        dtype, values = v.dtype, v.astype(weights.dtype)
        from_state = jnp.einsum("bthk,bhkv->bthv", state_queries, state.astype(weights.dtype))
        expected, _ = gated_linear_recurrence(
            q, k, values, log_gate, initial_state=state, method="scan"
        )
    output = jnp.einsum("bhts,bshv->bthv", weights, values) + from_state
    projections = mixer.cell if isinstance(mixer, SimpleRNN) else mixer
    layer_output = projections.project_outputs(output.astype(dtype), output_gate)
    errors = _relative_error(output, expected), _relative_error(layer_output, call.output)
    return LayerDecomposition(weights, values, from_state, output, *errors)


def _decompose_attention(
    attention: Attention, q: Queries, k: Keys, v: Values, cache: KVCache
) -> tuple[jax.Array, Values, Values, Values]:
    """Decompose softmax attention, before the rotary embedding, as it is linear in the values.

    Returns:
      Weights, values and part of the cache, as in `LayerDecomposition`, and the output of the
      layer's operator; float32 (float64 if the layer's dtype is).
    """
    dtype = accumulator_dtype(attention.dtype)

    def rounded(x: jax.Array) -> jax.Array:
        """Round to the layer's dtype, as in the layer; what follows is float32 at least."""
        return x.astype(attention.dtype).astype(dtype)

    positions = cache.length[:, None] + jnp.arange(q.shape[1], dtype=jnp.int32)[None]
    visible = jnp.minimum(positions + 1, attention.context)
    past_k, past_v = (rounded(cached) for cached in cached_in_order(cache))
    q, k, v = rounded(apply_rope(q, positions)), rounded(apply_rope(k, positions)), rounded(v)
    keys = jnp.concatenate([past_k, k], axis=1)

    def operator(past: jax.Array, new: jax.Array) -> jax.Array:
        """Attend to these values of the cached and of the new tokens."""
        values = jnp.concatenate([past, new], axis=1)
        return sliding_attention(q, keys, values, visible, attention.context)

    length = v.shape[1]
    units = jnp.broadcast_to(jnp.eye(length, dtype=dtype)[None, :, None], (*v.shape[:3], length))
    weights = operator(jnp.zeros((*past_v.shape[:3], length), dtype), units)
    return jnp.moveaxis(weights, 2, 1), v, operator(past_v, jnp.zeros_like(v)), operator(past_v, v)


def _relative_error(actual: jax.Array, expected: jax.Array) -> jax.Array:
    """Return RMS(actual - expected) / RMS(expected); 0 if both are 0."""
    dtype = accumulator_dtype(expected)
    actual, expected = actual.astype(dtype), expected.astype(dtype)
    error = jnp.sqrt(jnp.mean((actual - expected) ** 2))
    scale = jnp.sqrt(jnp.mean(expected**2))
    return error / jnp.maximum(scale, jnp.finfo(dtype).tiny)


def decompose_layers(
    model: LanguageModel, tokens: np.ndarray, state: ModelState
) -> tuple[LayerDecomposition, ...]:
    """Decompose every layer's outputs for [T] tokens after `state`, which has batch size 1.

    Returns:
      One decomposition per layer, NumPy arrays with B = 1.
    """

    @nnx.jit
    def run(
        model: LanguageModel, tokens: jax.Array, state: ModelState
    ) -> tuple[LayerDecomposition, ...]:
        return tuple(map(decompose_layer, find_mixers(model), record(model, tokens, state)[0]))

    # By default an accelerator rounds the operands of a matmul to fewer bits.
    with jax.default_matmul_precision("highest"):
        results = run(model, np.asarray(tokens, np.int32)[None], state)
    layers: tuple[LayerDecomposition, ...] = jax.device_get(results)
    return layers


def is_exact(layer: LayerDecomposition, is_float32: bool) -> bool:
    """Return whether no error exceeds `MAX_ERROR` or is NaN.

    Args:
      layer: decomposition of one layer.
      is_float32: whether the model computes in float32. Otherwise the layer
        rounds its output where the decomposition does not, and only the operator's error counts.
    """
    errors = [layer.operator_error, *([layer.layer_error] if is_float32 else [])]
    return all(bool(error <= MAX_ERROR) for error in errors)


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
    the first token, has batch size 1.
    """

    @nnx.jit
    def gradients(
        model: LanguageModel, tokens: jax.Array, positions: jax.Array, state: ModelState
    ) -> tuple[jax.Array, jax.Array]:
        embeddings = model.embedding(tokens)[0]

        def log_probability(embeddings: jax.Array, state: ModelState) -> jax.Array:
            reader = nnx.merge(*nnx.split(model))  # a copy whose token at position i has the id i
            reader.embedding.embedding = nnx.Param(embeddings)
            hidden, _ = reader.hidden_states(positions, state)
            return jax.nn.log_softmax(model.logits(hidden[0, -1]))[target]

        # A state may hold counters, which have no gradient.
        gradient = jax.grad(log_probability, argnums=(0, 1), allow_int=True)
        by_token, by_state = gradient(embeddings, state)
        products = [
            jnp.sum(slope.astype(jnp.float32) * x.astype(jnp.float32))
            for slope, x in zip(jax.tree.leaves(by_state), jax.tree.leaves(state), strict=True)
            if jnp.issubdtype(x.dtype, jnp.floating)
        ]
        return jnp.sum(by_token * embeddings, axis=-1), sum(products, jnp.zeros(()))

    ids = np.asarray(tokens, np.int32)[None]
    positions = np.arange(len(tokens), dtype=np.int32)[None]
    by_token, by_state = gradients(model, ids, positions, state)
    return Contributions(np.asarray(by_token, np.float64), float(by_state))


def map_contributions(layer: LayerDecomposition, position: int) -> Contributions:
    """Compute the share of each token, up to `position`, in the output of a layer's mixer there.

    The share of a summand of y_t = sum_j A_tj v_j + (part of the initial state) is its projection
    on y_t, ``<A_tj v_j, y_t> / <y_t, y_t>``, averaged over the heads: all shares sum to 1. A
    negative share points the other way. `layer` has B = 1.
    """
    seen = position + 1
    weights = np.asarray(layer.weights[0, :, position, :seen], np.float64)  # [H, seen]
    values = np.asarray(layer.values[0, :seen], np.float64)  # [seen, H, V]
    output = np.asarray(layer.output[0, position], np.float64)  # [H, V]
    from_state = np.asarray(layer.from_state[0, position], np.float64)
    squares = np.maximum(np.sum(output**2, axis=-1), np.finfo(np.float64).tiny)  # [H]
    projections = np.einsum("thv,hv->ht", values, output) / squares[:, None]
    state = np.sum(from_state * output, axis=-1) / squares
    return Contributions(np.mean(weights * projections, axis=0), float(np.mean(state)))
