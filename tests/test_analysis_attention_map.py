"""The implicit attention of a recurrence against its definition written out."""

import contextlib

import jax
import numpy as np
import pytest

from simplernn_jax.analysis.attention_map import attention_map, read_values
from simplernn_jax.ops import gated_linear_recurrence

BATCH, HEADS, KEYS, VALUES = 2, 3, 5, 7
SEGMENTS = {"one": lambda t: 0 * t, "some": lambda t: (t + 3) // 11, "every token": lambda t: t}
GATES = {"weak": (-1e-2, -1e-6), "mixed": (-9.0, 0.0), "strong": (-1e3, -30.0)}


def draw(length, gates):
    random = np.random.default_rng(length)
    low, high = GATES[gates]
    shape = (BATCH, length, HEADS, KEYS)
    q, k = random.normal(size=shape), random.uniform(size=shape)
    v = random.normal(size=(BATCH, length, HEADS, VALUES))
    state = random.normal(size=(BATCH, HEADS, KEYS, VALUES))
    return q, k, v, random.uniform(low, high, shape), state


def written_out(q, k, log_gate, ids):
    """A_tj as the definition has it, q_t times all gates, and which pairs share a segment."""
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


def relative_error(actual, expected):
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert np.isfinite(actual).all()
    scale = max(np.sqrt(np.mean(expected**2)), np.finfo(np.float64).tiny)
    return np.sqrt(np.mean((actual - expected) ** 2)) / scale


@jax.jit
def computed(q, k, v, log_gate, state, ids):
    """The map, what it makes of values and state, and what `scan` makes of them."""
    result = attention_map(q, k, log_gate, segment_ids=ids)
    options = {"initial_state": state, "segment_ids": ids, "method": "scan"}
    expected, _ = gated_linear_recurrence(q, k, v, log_gate, **options)
    return result, read_values(result, v, state), expected


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("segments", SEGMENTS)
@pytest.mark.parametrize("length", [1, 65])
@pytest.mark.parametrize(("dtype", "limit"), [(np.float32, 1e-6), (np.float64, 1e-14)])
def test_equals_the_definition_and_reproduces_the_recurrence(length, segments, gates, dtype, limit):
    precise = jax.enable_x64(True) if dtype == np.float64 else contextlib.nullcontext()
    with precise:
        inputs = [x.astype(dtype) for x in draw(length, gates)]
        row = SEGMENTS[segments](np.arange(length))
        ids = np.stack([row, row // 2]).astype(np.int32)
        result, parts, expected = jax.device_get(computed(*inputs, ids))
    q, k, _, log_gate, _ = (x.astype(np.float64) for x in inputs)
    weights, queries, allowed = written_out(q, k, log_gate, ids)
    assert result.weights.dtype == dtype
    assert relative_error(result.weights, weights) < limit
    np.testing.assert_array_equal(np.where(allowed[:, None], 0, result.weights), 0)
    # A gate below e^-16 counts as e^-16 in float32: 1e-7 of the queries.
    np.testing.assert_allclose(result.state_queries, queries, rtol=20 * limit, atol=limit)
    assert relative_error(sum(parts), expected) < limit
