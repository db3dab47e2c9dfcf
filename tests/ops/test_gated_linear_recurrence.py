"""Every method of the recurrence against `scan` in float64: output, final state and gradients."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from references import assert_accurate, draw_recurrence, recurrence, value_and_gradients

from simplernn_jax.ops import gated_linear_recurrence, recurrent_step
from simplernn_jax.ops.gated_linear_recurrence import simple_rnn_recurrence
from simplernn_jax.ops.rms_norm import rms_norm, rms_norm_convolution

LENGTHS = (1, 7, 65, 600)  # 600: the last group has a chunk of padding
# Heads, K, V: one head and several, K != V.
SHAPES = ((1, 13, 7), (3, 5, 11))
BATCH = 2
# "auto" is "fused" in float32 on a CPU.
METHODS = {"auto": {}, "chunkwise": {"chunk_size": 32}}
CHUNKS = {f"chunks of {size}": {"chunk_size": size} for size in (8, 16, 128)}


@pytest.fixture(autouse=True)
def _x64(monkeypatch):
    # On one device, gradients keep states; test_sharded_operands.py covers several.
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
    def log_gates(rng, shape):
        return draw_log_gates(rng, gates, shape)

    return draw_recurrence(BATCH, length, *shape, jnp.float64, log_gates, seed)


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


@functools.partial(jax.jit, static_argnames=("method", "chunk_size"))
def run(inputs, segment_ids, cotangents, **options):
    return value_and_gradients(
        lambda *inputs: recurrence(*inputs, segment_ids, **options), inputs, cotangents
    )


def check(inputs, segment_ids, cotangents, dtype, limits, **options):
    gate_dtype = jnp.float64 if dtype == jnp.float64 else jnp.float32
    low = [x.astype(dtype) for x in inputs[:3]] + [x.astype(gate_dtype) for x in inputs[3:]]
    exact = [x.astype(jnp.float64) for x in low]
    expected = run(exact, segment_ids, cotangents, method="scan")
    assert_accurate(run(low, segment_ids, cotangents, **options), expected, limits)


LIMITS = {
    jnp.float64: {"all": 1e-12},
    jnp.float32: {"all": 5e-6, "d_log_gate": 3e-5},
    jnp.bfloat16: {"all": 1e-2},
}


CASES = (
    [(length, SHAPES[n % 2], "mixed", "none") for n, length in enumerate(LENGTHS)]
    + [(131, SHAPES[1], gates, "none") for gates in ("near_one", "strong", "tiny")]
    + [(2, SHAPES[1], "mixed", "every_token"), (64, SHAPES[1], "mixed", "edges")]
    + [(131, SHAPES[1], "mixed", kind) for kind in ("edges", "inside", "every_token")]
)


# In float64 "auto" is "chunkwise"; lower precisions round the same sums.
@pytest.mark.parametrize(
    ("dtype", "method", "length", "shape", "gates", "segments"),
    [
        (dtype, method, *case)
        for dtype, method, cases in (
            (jnp.float64, "chunkwise", CASES),
            (jnp.float64, "auto", CASES[-2:]),
            *((jnp.float64, method, CASES[-2:-1]) for method in CHUNKS),
            (jnp.float32, "auto", CASES),
            (jnp.float32, "chunkwise", [*CASES[3:7], CASES[-2]]),
            *((jnp.bfloat16, method, [*CASES[3:5], CASES[-2]]) for method in METHODS),
        )
        for case in cases
    ],
)
def test_equals_scan(dtype, method, length, shape, gates, segments):
    inputs, cotangents = draw_inputs(length, shape, gates)
    ids = draw_segments(segments, length)
    check(inputs, ids, cotangents, dtype, LIMITS[dtype], **(METHODS | CHUNKS)[method])


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=15)
@given(
    logits=st.lists(st.floats(-60, 60, width=32), min_size=8, max_size=8),
    seed=st.integers(0, 2**16),
    cut=st.booleans(),
)
def test_no_gate_gives_nan(method, logits, seed, cut):
    (q, k, v, _, state), cotangents = draw_recurrence(1, 67, 2, 5, 5, jnp.float32, seed=seed)
    chosen = np.asarray(logits)[np.random.default_rng(seed).integers(0, 8, q.shape)]
    log_gate = jax.nn.log_sigmoid(jnp.asarray(chosen, jnp.float32))
    segments = jnp.asarray((np.arange(67) // (9 if cut else 100))[None])
    results = run((q, k, v, log_gate, state), segments, cotangents, **METHODS[method])
    chex.assert_tree_all_finite(results)


def test_equals_the_equations_in_numpy():
    (q, k, v, log_gate, state), _ = draw_inputs(7, SHAPES[0], "mixed")
    output, final = gated_linear_recurrence(q, k, v, log_gate, initial_state=state, method="scan")
    expected = np.asarray(state)
    for t in range(7):
        gate = np.exp(log_gate[:, t])[..., None]
        expected = gate * expected + np.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        y = np.einsum("bhkv,bhk->bhv", expected, q[:, t])
        chex.assert_trees_all_close(output[:, t], y, rtol=1e-12)
    chex.assert_trees_all_close(final, expected, rtol=1e-12)
    y, _ = recurrent_step(q[:, 0], k[:, 0], v[:, 0], log_gate[:, 0], state)
    chex.assert_trees_all_close(output[:, 0], y, rtol=1e-12)


def test_causality_by_gradients():
    """d y_t / d v_j is non-zero for j <= t in the same segment and exactly zero elsewhere."""
    length, heads, width = 37, 2, 3
    (q, k, v, log_gate, _), _ = draw_inputs(length, (heads, width, width), "near_one")
    q, k = jnp.abs(q[:1]), k[:1]
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


@pytest.mark.parametrize(
    "sizes", [(0, 4, 2, 3, 5), (2, 0, 2, 3, 5), (2, 4, 0, 3, 5), (2, 4, 2, 0, 5), (2, 4, 2, 3, 0)]
)
def test_empty_axes(sizes):
    batch, length, heads, key_dim, value_dim = sizes
    q = jnp.ones((batch, length, heads, key_dim))
    v = jnp.ones((batch, length, heads, value_dim))
    state = jnp.ones((batch, heads, key_dim, value_dim))

    def run(method, q, v, state):
        return gated_linear_recurrence(q, q, v, -q, initial_state=state, method=method)

    def total(method, *inputs):
        return jnp.sum(run(method, *inputs)[0])

    for method in ("auto", "chunkwise"):
        output, final = run(method, q, v, state)
        chex.assert_trees_all_close((output, final), run("scan", q, v, state))
        if length == 0:
            chex.assert_trees_all_equal(final, state)
        gradients = jax.grad(functools.partial(total, method), (0, 1, 2))(q, v, state)
        chex.assert_trees_all_equal_shapes(gradients, (q, v, state))


@pytest.mark.parametrize("method", ["auto", "chunkwise", "scan"])
def test_numpy_float64_is_float32_without_x64(method, monkeypatch):
    x = np.ones((2, 5, 3, 4))
    state = np.ones((2, 3, 4, 4))
    ids = np.zeros((2, 5), np.int64)
    # The annotations name JAX's arrays; NumPy's are accepted too.
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)
    with jax.enable_x64(False):
        results = gated_linear_recurrence(
            x, x, x, -x, initial_state=state, segment_ids=ids, method=method
        )
        normalized = rms_norm(x), *rms_norm_convolution(x[:, 0], x[0, 0], x[:, 0, 1:], None)
    chex.assert_type([*results, *normalized], jnp.float32)


def test_a_gate_instead_of_its_logarithm_is_refused_unless_it_is_traced():
    (q, k, v, log_gate, state), _ = draw_inputs(7, SHAPES[0], "near_one")
    message = r"^log_gate must be <= 0, got 0\.\d+: pass log\(gate\)$"
    gate = jnp.exp(log_gate) * 0.9
    with pytest.raises(ValueError, match=message):
        gated_linear_recurrence(q, k, v, gate, method="scan")
    with pytest.raises(ValueError, match=message):
        recurrent_step(q[:, 0], k[:, 0], v[:, 0], np.asarray(gate[:, 0]), state)
    jax.eval_shape(functools.partial(gated_linear_recurrence, method="scan"), q, k, v, gate)
    gated_linear_recurrence(q, k, v, jnp.zeros_like(gate), method="scan")


@pytest.mark.parametrize("method", METHODS)
def test_a_large_segment_leaves_the_gradients_of_the_one_before_exact(method):
    ids = jnp.asarray(np.stack([np.arange(61) // 29, np.arange(61) // 17]))
    (q, k, v, *others), cotangents = draw_inputs(61, SHAPES[1], "mixed")
    is_later = (ids > 0)[..., None, None]
    inputs = [jnp.where(is_later, 1000 * x, x) for x in (q, v)]
    low = [x.astype(jnp.float32) for x in (inputs[0], k, inputs[1], *others)]
    exact = run([x.astype(jnp.float64) for x in low], ids, cotangents, method="scan")
    found = run(low, ids, cotangents, **METHODS[method])
    for ours, theirs in zip(found[2:6], exact[2:6], strict=True):
        first, expected = (jnp.where(is_later, 0, x) for x in (ours, theirs))
        chex.assert_trees_all_close(first, expected, atol=3e-5 * float(jnp.abs(expected).max()))


@pytest.mark.parametrize("method", ["fused", "chunkwise", "scan"])
def test_a_reset_ends_a_state_that_is_not_finite(method):
    (q, k, v, log_gate, state), _ = draw_recurrence(2, 40, 3, 5, 7)
    ids = jnp.asarray(np.stack([np.arange(40) >= 1, np.arange(40) >= 33]).astype(np.int32))
    for value in (jnp.inf, jnp.nan):
        y, final = gated_linear_recurrence(
            q, k, v, log_gate, initial_state=state + value, segment_ids=ids, method=method
        )
        assert jnp.isfinite(jnp.where(ids[..., None, None] == 1, y, 0)).all()
        assert jnp.isfinite(final).all()


def draw_projections(length, heads, key_dim, value_dim, largest=3.0):
    rng = np.random.default_rng(0)
    keys, values = (BATCH, length, heads, key_dim), (BATCH, length, heads, value_dim)
    biases, state = (heads, key_dim), (BATCH, heads, key_dim, value_dim)
    shapes = (keys, keys, values, keys, biases, biases, state)
    inputs = [largest * rng.normal(size=shape).astype(np.float32) for shape in shapes]
    return inputs, [rng.normal(size=shape).astype(np.float32) for shape in (values, state)]


def of_projections(*inputs, segment_ids=None, method="auto"):
    """By `simple_rnn_recurrence`, or by its definition if `method` is None."""
    *arrays, state = inputs
    options = {"initial_state": state, "segment_ids": segment_ids}
    if method is not None:
        return simple_rnn_recurrence(*arrays, query_scale=0.3, method=method, **options)
    q, k, v, gate, key_bias, gate_bias = arrays
    k, log_gate = jax.nn.sigmoid(k + key_bias), jax.nn.log_sigmoid(gate + gate_bias)
    return gated_linear_recurrence(0.3 * q, k, v, log_gate, method="scan", **options)


@pytest.mark.parametrize("method", ["auto", "chunkwise"])
@pytest.mark.parametrize(
    ("length", "shape", "segments"),
    [(1, (1, 13, 7), "none"), (131, (3, 5, 11), "inside"), (300, (2, 40, 72), "edges")],
)
def test_recurrence_of_projections_equals_its_definition_in_float64(
    length, shape, segments, method
):
    inputs, cotangents = draw_projections(length, *shape)
    ids = draw_segments(segments, length)

    def results(dtype, method):
        arrays = [jnp.asarray(x, dtype) for x in inputs]

        @jax.jit
        def run(*arrays):
            y, back = jax.vjp(
                functools.partial(of_projections, segment_ids=ids, method=method), *arrays
            )
            return y, back(tuple(jnp.asarray(c, dtype) for c in cotangents))

        return run(*arrays)

    with jax.numpy_rank_promotion("allow"):
        expected = results(jnp.float64, None)
    ours = results(jnp.float32, method)
    for result, exact in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        assert result.dtype == jnp.float32
        exact = np.asarray(exact)
        assert np.abs(np.asarray(result) - exact).max() <= 5e-5 * np.abs(exact).max()


def test_transformations_of_the_recurrence_of_projections():
    inputs = [jnp.asarray(x) for x in draw_projections(9, 2, 5, 3)[0]]

    def total(method, *inputs):
        y, state = of_projections(*inputs, method=method)
        return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.cos(state))

    def transformed(method):
        gradient = jax.grad(functools.partial(total, method), (0, 1, 3, 4, 5))
        tangents = tuple(map(jnp.cos, inputs))
        forward = jax.jvp(functools.partial(total, method), tuple(inputs), tangents)
        mapped = jax.vmap(gradient, (0, 0, 0, 0, None, None, 0))
        second = jax.grad(lambda *inputs: sum(jnp.sum(jnp.square(x)) for x in gradient(*inputs)))
        stacked = [jnp.stack([x, x / 2]) if x.ndim > 2 else x for x in inputs]
        return forward, mapped(*stacked), second(*inputs)

    with jax.numpy_rank_promotion("allow"):
        expected = transformed(None)
    chex.assert_trees_all_close(transformed("auto"), expected, rtol=2e-4, atol=2e-4)


def test_recurrence_of_projections_is_finite_for_any_finite_input():
    for largest in (1e4, 1e18):
        inputs, cotangents = draw_projections(5, 2, 5, 3, largest)
        inputs[0], inputs[2], inputs[6] = (x / largest for x in (inputs[0], inputs[2], inputs[6]))
        arrays = [jnp.asarray(x) for x in inputs]
        y, back = jax.vjp(of_projections, *arrays)
        chex.assert_tree_all_finite((y, back(tuple(map(jnp.asarray, cotangents)))))
