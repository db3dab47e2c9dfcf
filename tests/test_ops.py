"""The recurrence against its definition: output, final state and every gradient.

Errors are RMS(difference) / RMS(reference). The reference is `scan` in float64.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simplernn_jax.ops import gated_linear_recurrence, recurrent_step
from simplernn_jax.ops.rms_norm import rms_norm
from simplernn_jax.ops.rms_norm_convolution import rms_norm_convolution

NAMES = ("output", "final_state", "d_q", "d_k", "d_v", "d_log_gate", "d_initial_state")
LENGTHS = (1, 2, 7, 63, 64, 65, 256, 1000)
# heads, K, V: one head and several, K != V.
SHAPES = ((1, 13, 7), (3, 5, 11))
BATCH = 2
# Chosen by the operator (in float32 on a CPU: the fused function), and in chunks in any case.
WAYS = {"chosen": {}, "chunks": {"chunk_size": 32}}


@pytest.fixture(autouse=True)
def _x64(monkeypatch):
    # On one device gradients keep states; test_sharded_operands.py is about several.
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    with jax.enable_x64(True):
        yield


def draw_log_gates(rng, kind, shape):
    match kind:
        case "near_one":
            return -np.exp(rng.uniform(np.log(1e-7), np.log(1e-2), shape))
        case "mixed":  # every scale from a gate of about 1 down to 1e-12
            return -np.exp(rng.uniform(np.log(1e-6), np.log(27.6), shape))
        case "strong":  # uniform in the logarithm, down to 1e-12
            return rng.uniform(-27.6, 0, shape)
        case "tiny":
            return np.full(shape, np.log(1e-12))


def draw_inputs(length, shape, gates, seed=0):
    rng = np.random.default_rng([seed, length, shape[0]])
    heads, key_dim, value_dim = shape
    q = rng.normal(size=(BATCH, length, heads, key_dim))
    k = 1 / (1 + np.exp(-rng.normal(size=q.shape)))
    v = rng.normal(size=(BATCH, length, heads, value_dim))
    state = rng.normal(size=(BATCH, heads, key_dim, value_dim))
    inputs = (q, k, v, draw_log_gates(rng, gates, q.shape), state)
    cotangents = (rng.normal(size=v.shape), rng.normal(size=state.shape))
    return inputs, cotangents


def draw_segments(kind, length):
    """``[B, T]`` ids with boundaries at chunk edges, inside chunks, at every token, or None."""
    time = np.arange(length)
    match kind:
        case "none":
            return None
        case "edges":
            return jnp.asarray(np.stack([time // 32, time // 64]))
        case "inside":
            return jnp.asarray(np.stack([(time + 5) // 13, (time + 11) // 37]))
        case "every_token":
            return jnp.asarray(np.stack([time, time // 2]))


def value_and_gradients(inputs, segment_ids, cotangents, **options):
    """Output, final state and the five gradients, under one compiled program."""

    def run(inputs, segment_ids, cotangents):
        def call(q, k, v, log_gate, state):
            return gated_linear_recurrence(
                q, k, v, log_gate, initial_state=state, segment_ids=segment_ids, **options
            )

        results, pullback = jax.vjp(call, *inputs)
        gradients = pullback(
            tuple(c.astype(r.dtype) for c, r in zip(cotangents, results, strict=True))
        )
        return *results, *gradients

    return jax.jit(run)(inputs, segment_ids, cotangents)


def relative_rms(actual, expected):
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return np.sqrt(np.mean((actual - expected) ** 2)) / np.sqrt(np.mean(expected**2))


def check(inputs, segment_ids, cotangents, dtype, limits, **options):
    low = [jnp.asarray(x, dtype) for x in inputs[:3]]
    high = jnp.float64 if dtype == jnp.float64 else jnp.float32
    low += [jnp.asarray(x, high) for x in inputs[3:]]
    exact = [x.astype(jnp.float64) for x in low]
    cotangents = [jnp.asarray(c, jnp.float64) for c in cotangents]
    expected = value_and_gradients(exact, segment_ids, cotangents, method="scan")
    actual = value_and_gradients(low, segment_ids, cotangents, **options)
    for name, ours, reference in zip(NAMES, actual, expected, strict=True):
        assert np.isfinite(np.asarray(ours, np.float64)).all(), name
        if np.sqrt(np.mean(np.asarray(reference) ** 2)) < 1e-7:
            # Such a gradient is nothing but rounding in float32: gates of 1e-12 leave nothing of
            # the state before them, cleared tokens nothing of their gates.
            assert np.sqrt(np.mean(np.asarray(ours, np.float64) ** 2)) < 1e-5, name
            continue
        assert relative_rms(ours, reference) <= limits.get(name, limits["all"]), name


LIMITS = {
    jnp.float64: {"all": 1e-12},
    jnp.float32: {"all": 5e-6, "d_log_gate": 3e-5},
    jnp.bfloat16: {"all": 1e-2},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype", LIMITS, ids=lambda d: d.__name__)
def test_fast_ways_equal_scan(dtype, length, shape, way):
    inputs, cotangents = draw_inputs(length, shape, "mixed")
    check(inputs, None, cotangents, dtype, LIMITS[dtype], **WAYS[way])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("gates", ["near_one", "strong", "tiny"])
@pytest.mark.parametrize("dtype", LIMITS, ids=lambda d: d.__name__)
def test_fast_ways_equal_scan_for_gates_of_every_strength(dtype, gates, way):
    inputs, cotangents = draw_inputs(131, SHAPES[1], gates)
    check(inputs, None, cotangents, dtype, LIMITS[dtype], **WAYS[way])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["edges", "inside", "every_token"])
@pytest.mark.parametrize("length", [2, 64, 131])
@pytest.mark.parametrize("dtype", LIMITS, ids=lambda d: d.__name__)
def test_fast_ways_equal_scan_with_segments(dtype, length, kind, way):
    inputs, cotangents = draw_inputs(length, SHAPES[1], "mixed", seed=1)
    segments = draw_segments(kind, length)
    check(inputs, segments, cotangents, dtype, LIMITS[dtype], **WAYS[way])


@pytest.mark.parametrize("chunk_size", [8, 16, 128])
def test_chunkwise_equals_scan_for_every_chunk_size(chunk_size):
    inputs, cotangents = draw_inputs(131, SHAPES[0], "mixed", seed=2)
    segments = draw_segments("inside", 131)
    check(inputs, segments, cotangents, jnp.float64, {"all": 1e-12}, chunk_size=chunk_size)


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=30)
@given(
    logits=st.lists(st.floats(-60, 60, width=32), min_size=8, max_size=8),
    seed=st.integers(0, 2**16),
    cut=st.booleans(),
)
def test_no_gate_gives_nan(way, logits, seed, cut):
    """Finite inputs give finite results, whatever the gates, also right beside each other."""
    rng = np.random.default_rng(seed)
    chosen = np.asarray(logits)[rng.integers(0, 8, (1, 67, 2, 5))]
    log_gate = jax.nn.log_sigmoid(jnp.asarray(chosen, jnp.float32))
    q, k, v = (jnp.asarray(rng.normal(size=(1, 67, 2, 5)), jnp.float32) for _ in range(3))
    state = jnp.asarray(rng.normal(size=(1, 2, 5, 5)), jnp.float32)
    segments = jnp.asarray((np.arange(67) // (9 if cut else 100))[None])
    cotangents = (jnp.ones_like(v), jnp.ones_like(state))
    results = _jitted(way, [q, k, v, log_gate, state], segments, cotangents)
    chex.assert_tree_all_finite(results)


@functools.partial(jax.jit, static_argnums=0)
def _jitted(way, inputs, segments, cotangents):
    def call(*inputs):
        return gated_linear_recurrence(
            *inputs[:4], initial_state=inputs[4], segment_ids=segments, **WAYS[way]
        )

    results, pullback = jax.vjp(call, *inputs)
    return results, pullback(cotangents)


@pytest.mark.parametrize("method", ["scan", "chunkwise"])
def test_split_sequences_equal_the_whole(method):
    """Carrying the state from part to part changes nothing, wherever the cut is."""
    (q, k, v, log_gate, state), _ = draw_inputs(97, SHAPES[1], "mixed")
    whole, final = gated_linear_recurrence(q, k, v, log_gate, initial_state=state, method=method)
    parts = []
    for start, stop in ((0, 1), (1, 41), (41, 97)):
        cut = [x[:, start:stop] for x in (q, k, v, log_gate)]
        part, state = gated_linear_recurrence(*cut, initial_state=state, method=method)
        parts.append(part)
    chex.assert_trees_all_close(jnp.concatenate(parts, 1), whole, rtol=1e-11, atol=1e-11)
    chex.assert_trees_all_close(state, final, rtol=1e-11, atol=1e-11)


def test_recurrent_step_is_the_recurrence():
    """The equations of the cell, written out in numpy."""
    (q, k, v, log_gate, state), _ = draw_inputs(7, SHAPES[0], "mixed")
    output, final = gated_linear_recurrence(q, k, v, log_gate, initial_state=state, method="scan")
    expected = state.copy()
    for t in range(7):
        gate = np.exp(log_gate[:, t])[..., None]
        expected = gate * expected + np.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        y = np.einsum("bhkv,bhk->bhv", expected, q[:, t])
        chex.assert_trees_all_close(output[:, t], y, rtol=1e-12)
    chex.assert_trees_all_close(final, expected, rtol=1e-12)
    y, _ = recurrent_step(q[:, 0], k[:, 0], v[:, 0], log_gate[:, 0], jnp.asarray(state))
    chex.assert_trees_all_close(output[:, 0], y, rtol=1e-12)


def test_causality_by_gradients():
    """d y_t / d v_j is non-zero for j <= t in the same segment and exactly zero elsewhere."""
    length, heads, width = 37, 2, 3
    (q, k, v, log_gate, _), _ = draw_inputs(length, (heads, width, width), "near_one")
    q, k = np.abs(q[:1]), k[:1]
    segments = jnp.asarray((np.arange(length) // 11)[None])

    def total_at(v, t):
        y, _ = gated_linear_recurrence(q, k, v, log_gate[:1], segment_ids=segments)
        return jnp.sum(y[:, t])

    influence = jax.jit(jax.vmap(jax.grad(total_at), (None, 0)))(v[:1], jnp.arange(length))
    influence = np.abs(np.asarray(influence)[:, 0]).sum((-1, -2))
    time = np.arange(length)
    reads = (time[:, None] >= time) & (time[:, None] // 11 == time // 11)
    assert (influence[reads] > 0).all()
    assert (influence[~reads] == 0).all()


def test_a_boundary_at_the_first_token_is_no_change():
    """The initial state belongs to the first token's segment, whatever its id."""
    (q, k, v, log_gate, state), _ = draw_inputs(13, SHAPES[0], "near_one")
    ids = jnp.full((BATCH, 13), 7)
    a = gated_linear_recurrence(q, k, v, log_gate, initial_state=state, segment_ids=ids)
    b = gated_linear_recurrence(q, k, v, log_gate, initial_state=state)
    chex.assert_trees_all_close(a, b, rtol=1e-12)


def test_no_tokens_leave_the_state():
    state = jnp.ones((2, 3, 5, 7), jnp.float32)
    empty = jnp.zeros((2, 0, 3, 5), jnp.float32)
    output, final = gated_linear_recurrence(
        empty, empty, jnp.zeros((2, 0, 3, 7)), empty, initial_state=state
    )
    chex.assert_shape(output, (2, 0, 3, 7))
    chex.assert_trees_all_equal(final.astype(jnp.float32), state)


@pytest.mark.parametrize("sizes", [(0, 2, 3, 5), (2, 0, 3, 5), (2, 2, 0, 5), (2, 2, 3, 0)], ids=str)
def test_an_axis_without_entries(sizes):
    batch, heads, key_dim, value_dim = sizes
    q = jnp.ones((batch, 4, heads, key_dim))
    v = jnp.ones((batch, 4, heads, value_dim))
    state = jnp.ones((batch, heads, key_dim, value_dim))

    def run(method, q, v, state):
        return gated_linear_recurrence(q, q, v, -q, initial_state=state, method=method)

    def total(method, *inputs):
        return jnp.sum(run(method, *inputs)[0])

    for method in ("auto", "chunkwise"):
        chex.assert_trees_all_close(run(method, q, v, state), run("scan", q, v, state))
        gradients = jax.grad(functools.partial(total, method), (0, 1, 2))(q, v, state)
        chex.assert_trees_all_equal_shapes(gradients, (q, v, state))


@pytest.mark.parametrize("method", ["auto", "chunkwise", "scan"])
def test_float64_of_numpy_is_float32_without_x64(method):
    x = np.ones((2, 5, 3, 4))
    state = np.ones((2, 3, 4, 4))
    ids = np.zeros((2, 5), np.int64)
    with jax.enable_x64(False):
        results = gated_linear_recurrence(
            x, x, x, -x, initial_state=state, segment_ids=ids, method=method
        )
        normalized = rms_norm(x), *rms_norm_convolution(x[:, 0], x[0, 0], x[:, 0, 1:], None)
    chex.assert_type([*results, *normalized], jnp.float32)


def test_dtypes_of_results():
    """The output has the values' dtype; the state stays float32."""
    (q, k, v, log_gate, _), _ = draw_inputs(17, SHAPES[0], "near_one")
    low = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]
    for method in ("scan", "chunkwise"):
        output, state = gated_linear_recurrence(
            *low, jnp.asarray(log_gate, jnp.float32), method=method
        )
        assert (output.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)


def test_wrong_calls_say_what_is_wrong():
    (q, k, v, log_gate, state), _ = draw_inputs(7, SHAPES[0], "near_one")
    with pytest.raises(ValueError, match=r"^k: expected \[B, T, H, K\] with B = 2, T = 7"):
        gated_linear_recurrence(q, k[:, :3], v, log_gate)
    with pytest.raises(ValueError, match=r"^v: expected \[B, T, H, V\]"):
        gated_linear_recurrence(q, k, v[:, :3], log_gate)
    with pytest.raises(ValueError, match=r"^initial_state: expected \[B, H, K, V\]"):
        gated_linear_recurrence(q, k, v, log_gate, initial_state=state[..., :2])
    with pytest.raises(ValueError, match=r"^segment_ids: expected \[B, T\]"):
        gated_linear_recurrence(q, k, v, log_gate, segment_ids=jnp.zeros((2, 3), int))
    with pytest.raises(ValueError, match="method='fast'"):
        gated_linear_recurrence(q, k, v, log_gate, method="fast")
    with pytest.raises(ValueError, match="power of two"):
        gated_linear_recurrence(q, k, v, log_gate, chunk_size=24)
