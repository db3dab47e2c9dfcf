"""Attention maps of the recurrence and of softmax attention against their definitions."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from references import relative_rms

from simplernn_jax.analysis.attention_map import (
    apply_map,
    attention_inputs,
    attention_map,
    softmax_map,
)
from simplernn_jax.models.mixers.attention import Attention
from simplernn_jax.ops import gated_linear_recurrence

BATCH, HEADS, KEYS, VALUES = 2, 3, 5, 7
SEGMENTS = {"one": lambda t: 0 * t, "some": lambda t: (t + 3) // 11, "every token": lambda t: t}
LENGTH, CONTEXT, PAST = 11, 5, 7
GATES = {"weak": (-1e-2, -1e-6), "mixed": (-9.0, 0.0), "strong": (-1e3, -30.0)}


def draw(length, gates):
    random = np.random.default_rng(length)
    low, high = GATES[gates]
    shape = (BATCH, length, HEADS, KEYS)
    q, k = random.normal(size=shape), random.uniform(size=shape)
    v = random.normal(size=(BATCH, length, HEADS, VALUES))
    state = random.normal(size=(BATCH, HEADS, KEYS, VALUES))
    return q, k, v, random.uniform(low, high, shape), state


def by_definition(q, k, log_gate, ids):
    """Return A_tj by definition, q_t times all gates, and the pairs that share a segment."""
    batch, length, heads, _ = q.shape
    weights, queries = np.zeros((batch, heads, length, length)), np.zeros_like(q)
    allowed = np.zeros((batch, length, length), bool)
    starts = np.concatenate([np.zeros((batch, 1), bool), ids[:, 1:] != ids[:, :-1]], axis=1)
    segment = np.cumsum(starts, axis=1)
    for b in range(batch):
        for t in range(length):
            if segment[b, t] == 0:
                queries[b, t] = q[b, t] * np.exp(log_gate[b, : t + 1].sum(axis=0))
            for j in range(t + 1):
                allowed[b, t, j] = segment[b, t] == segment[b, j]
                if allowed[b, t, j]:
                    decay = np.exp(log_gate[b, j + 1 : t + 1].sum(axis=0))
                    weights[b, :, t, j] = np.sum(q[b, t] * k[b, j] * decay, axis=-1)
    return weights, queries, allowed


@jax.jit
def computed(q, k, v, log_gate, state, ids):
    """Return the map, its application to values and state, and the output of `scan`."""
    result = attention_map(q, k, log_gate, segment_ids=ids)
    options = {"initial_state": state, "segment_ids": ids, "method": "scan"}
    expected, _ = gated_linear_recurrence(q, k, v, log_gate, **options)
    return result, apply_map(result, v, state), expected


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("segments", SEGMENTS)
@pytest.mark.parametrize("length", [1, 29])
@pytest.mark.parametrize(("dtype", "limit"), [(np.float32, 1e-6), (np.float64, 1e-14)])
def test_implicit_map_equals_its_definition_and_reproduces_the_recurrence(
    length, segments, gates, dtype, limit
):
    precise = jax.enable_x64(True) if dtype == np.float64 else contextlib.nullcontext()
    with precise:
        inputs = [x.astype(dtype) for x in draw(length, gates)]
        ids = SEGMENTS[segments](np.arange(length))
        ids = np.stack([ids, ids // 2]).astype(np.int32)
        result, parts, expected = jax.device_get(computed(*inputs, ids))
    q, k, _, log_gate, _ = (x.astype(np.float64) for x in inputs)
    weights, queries, allowed = by_definition(q, k, log_gate, ids)
    assert result.weights.dtype == dtype
    assert relative_rms(result.weights, weights) < limit
    np.testing.assert_array_equal(np.where(allowed[:, None], 0, result.weights), 0)
    # A gate below e^-16 counts as e^-16 in float32: 1e-7 of the queries.
    np.testing.assert_allclose(result.state_queries, queries, rtol=20 * limit, atol=limit)
    assert relative_rms(sum(parts), expected) < limit


@pytest.mark.fewer_cases
@pytest.mark.parametrize("segments", [None, [0] * 4 + [1] * 7])
def test_softmax_map_equals_its_definition(segments):
    """Each token sees the last of its segment; with K = 2, RoPE turns by 1 radian a token."""
    attention = Attention(7, HEADS * 2, HEADS, 7, HEADS, context=CONTEXT, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(1, PAST + LENGTH, 7))
    x = jnp.asarray(x, jnp.float32)
    _, cache = attention(x[:, :PAST])
    ids = None if segments is None else jnp.asarray(segments, jnp.int32)[None]

    @jax.jit
    def weights_of(attention, x, cache):
        projected, _ = attention.project_inputs(x)
        return softmax_map(attention_inputs(attention, projected, cache, ids))

    weights = np.asarray(weights_of(attention, x[:, PAST:], cache))[0]
    (q, k, _), _ = attention.project_inputs(x)
    q, k = (np.asarray(part[0], np.float64) for part in (q, k))  # [PAST + LENGTH, H, K]
    segment = np.concatenate([np.zeros(PAST), segments or np.zeros(LENGTH)])
    q, k = q[..., 0] + 1j * q[..., 1], k[..., 0] + 1j * k[..., 1]
    for t in range(PAST, PAST + LENGTH):
        seen = [j for j in range(t - CONTEXT + 1, t + 1) if segment[j] == segment[t]]
        scores = [np.real(np.conj(q[t]) * k[j] * np.exp(1j * (j - t))) / 2**0.5 for j in seen]
        expected = np.exp(scores) / np.exp(scores).sum(axis=0)
        given = np.zeros((HEADS, CONTEXT + LENGTH))
        for j, weight in zip(seen, expected, strict=True):
            # Tokens before the call are cached in slot j modulo the context.
            given[:, j % CONTEXT if j < PAST else CONTEXT + j - PAST] = weight
        np.testing.assert_allclose(weights[:, t - PAST], given, rtol=1e-5, atol=1e-7)
