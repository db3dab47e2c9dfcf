"""The gated delta rule by chunks against its definition in float64, with gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simplernn_jax.ops.gated_delta_rule import gated_delta_rule

BATCH, HEADS, KEY_DIM, VALUE_DIM = 2, 3, 5, 11


def draw(length, seed=0):
    """Inputs ``(q, k, v, log_gate, beta, initial_state)``, float64, with unit keys."""
    random = np.random.default_rng(seed)
    q, k = random.normal(size=(2, BATCH, length, HEADS, KEY_DIM))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    v = random.normal(size=(BATCH, length, HEADS, VALUE_DIM))
    log_gate = -np.exp(random.uniform(np.log(1e-6), np.log(27), v.shape[:3]))
    beta = random.uniform(0, 2, v.shape[:3])
    return q, k, v, log_gate, beta, random.normal(size=(BATCH, HEADS, KEY_DIM, VALUE_DIM))


def segments(kind, length):
    time = np.arange(length)
    if kind == "none":
        return None
    ids = {"some": [(time + 5) // 13, time // 37], "every token": [time, time]}[kind]
    return jnp.asarray(np.stack(ids), jnp.int32)


def value_and_gradients(inputs, ids, **options):
    def function(*inputs):
        return gated_delta_rule(*inputs[:5], initial_state=inputs[5], segment_ids=ids, **options)

    outputs, gradient = jax.vjp(function, *inputs)
    return [*outputs, *gradient(jax.tree.map(lambda y: jnp.cos(3 * y), outputs))]


@pytest.mark.parametrize("kind", ["none", "some", "every token"])
@pytest.mark.parametrize(("length", "chunk_size"), [(1, 32), (7, 4), (65, 32), (131, 16)])
def test_chunks_equal_the_definition(length, chunk_size, kind):
    with jax.enable_x64(True):
        inputs, ids = map(jnp.asarray, draw(length)), segments(kind, length)
        inputs = tuple(inputs)
        found = value_and_gradients(inputs, ids, method="chunkwise", chunk_size=chunk_size)
        expected = value_and_gradients(inputs, ids, method="scan")
        for one, other in zip(found, expected, strict=True):
            assert np.abs(one - other).max() <= 1e-11 * max(1, np.abs(other).max())


def test_the_definition():
    """Two tokens, written out."""
    q, k, v, log_gate, beta, state = draw(2)
    head = 1
    s = state[0, head]
    for t in range(2):
        key, strength = k[0, t, head], beta[0, t, head]
        erase = np.eye(KEY_DIM) - strength * np.outer(key, key)
        s = np.exp(log_gate[0, t, head]) * erase @ s + strength * np.outer(key, v[0, t, head])
    with jax.enable_x64(True):
        inputs = map(jnp.asarray, (q, k, v, log_gate, beta))
        state = jnp.asarray(state)
        y, final = gated_delta_rule(*inputs, initial_state=state, method="scan")
    np.testing.assert_allclose(final[0, head], s, rtol=1e-13)
    np.testing.assert_allclose(y[0, 1, head], s.T @ q[0, 1, head], rtol=1e-12)


def test_the_state_continues_and_dtypes():
    q, k, v, log_gate, beta, _ = (jnp.asarray(x, jnp.float32) for x in draw(70))
    whole, final = gated_delta_rule(q, k, v.astype(jnp.bfloat16), log_gate, beta)
    assert (whole.dtype, final.dtype) == (jnp.bfloat16, jnp.float32)
    whole, final = gated_delta_rule(q, k, v, log_gate, beta)
    parts, state = [], None
    for start, end in ((0, 1), (1, 40), (40, 40), (40, 70)):
        part = (x[:, start:end] for x in (q, k, v, log_gate, beta))
        y, state = gated_delta_rule(*part, initial_state=state)
        parts.append(y)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, atol=1e-5)
    np.testing.assert_allclose(state, final, atol=1e-5)


def test_extreme_gates_stay_finite():
    q, k, v, log_gate, beta, state = (jnp.asarray(x, jnp.float32) for x in draw(70))
    for gate in (0.0, -1e30, jnp.finfo(jnp.float32).min):
        inputs = (q, k, v, jnp.full_like(log_gate, gate), beta, state)
        assert all(np.isfinite(x).all() for x in value_and_gradients(inputs, None))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"beta": np.ones((2, 3))}, ValueError, r"beta: expected \[B, T, H\]"),
        ({"log_gate": np.ones((2, 4, 3), int)}, TypeError, "log_gate"),
        ({"initial_state": np.ones((2, 3, 5, 5))}, ValueError, "initial_state"),
        ({"segment_ids": np.ones((2, 3), int)}, ValueError, "segment_ids"),
        ({"method": "fused"}, ValueError, "must be one of auto, chunkwise, scan"),
        ({"chunk_size": 0}, ValueError, "chunk_size"),
    ],
)
def test_wrong_arguments_are_rejected(change, error, message):
    names = ("q", "k", "v", "log_gate", "beta", "initial_state")
    with pytest.raises(error, match=message):
        gated_delta_rule(**dict(zip(names, draw(4), strict=True)) | change)
