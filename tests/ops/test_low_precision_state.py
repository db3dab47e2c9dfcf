"""A state kept in bfloat16: where it is rounded, and its error over a long sequence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import draw_recurrence, recurrence, relative_rms
from small_runs import small_model

from simplernn_jax.inference import generate
from simplernn_jax.ops.gated_linear_recurrence.low_precision_state import ROUNDING_INTERVAL
from simplernn_jax.ops.segments import reset_state, segment_starts

B, H, K, V = 2, 3, 5, 7


def inputs(length, half_life=50.0, mean=0.0):
    def log_gates(rng, shape):
        return np.full(shape, -np.log(2) / half_life)

    (q, k, v, log_gate, state), _ = draw_recurrence(B, length, H, K, V, log_gates=log_gates)
    return (q, k, mean + v, log_gate), state


def rounded(x):
    return x.astype(jnp.bfloat16).astype(jnp.float32)


def rounded_scan(arrays, state, segment_ids):
    """`scan` over chunks, the state rounded before and after each."""
    state, outputs = rounded(state), []
    resets = None if segment_ids is None else segment_starts(segment_ids)
    for first in range(0, arrays[0].shape[1], ROUNDING_INTERVAL):
        part = slice(first, first + ROUNDING_INTERVAL)
        ids = None
        if segment_ids is not None:
            ids = segment_ids[:, part]
            state = reset_state(state, resets[:, first])
        output, state = recurrence(*(x[:, part] for x in arrays), state, ids, method="scan")
        outputs.append(output)
        state = rounded(state)
    return jnp.concatenate(outputs, axis=1), state


@pytest.mark.fewer_cases
@pytest.mark.parametrize(
    "length", [1, ROUNDING_INTERVAL - 1, ROUNDING_INTERVAL, 2 * ROUNDING_INTERVAL + 5]
)
@pytest.mark.parametrize("has_segments", [False, True])
def test_rounds_the_state_after_every_chunk_and_at_the_end(length, has_segments):
    arrays, state = inputs(length)
    ids = None
    if has_segments:
        begins = np.random.default_rng(1).random((B, length)) < 0.03
        begins[0, ROUNDING_INTERVAL::ROUNDING_INTERVAL] = True  # at chunk boundaries, too
        ids = jnp.asarray(np.cumsum(begins, axis=1, dtype=np.int32))
    output, final = recurrence(*arrays, state, ids, state_dtype=jnp.bfloat16)
    expected, expected_final = rounded_scan(arrays, state, ids)
    assert (output.dtype, final.dtype) == (jnp.float32, jnp.bfloat16)
    np.testing.assert_allclose(output, expected, rtol=1e-2, atol=1e-2)
    # A sum that differs in its last bit may be rounded to the next number: one part in 256.
    np.testing.assert_allclose(final.astype(jnp.float32), expected_final, rtol=2**-7, atol=1e-3)
    exact, _ = recurrence(*arrays, state, ids)
    first = min(length, ROUNDING_INTERVAL)
    first_ids = None if ids is None else ids[:, :first]
    shifted, _ = recurrence(*(x[:, :first] for x in arrays), rounded(state), first_ids)
    np.testing.assert_allclose(output[:, :first], shifted, rtol=1e-5, atol=1e-5)
    assert np.any(np.abs(output - exact) > 1e-4)


def test_gradients_equal_the_exact_ones_up_to_rounding():
    arrays, state = inputs(2 * ROUNDING_INTERVAL)

    def loss(arrays, state, dtype):
        output, final = recurrence(*arrays, state, state_dtype=dtype)
        return jnp.sum(jnp.sin(output)) + jnp.sum(final.astype(jnp.float32) ** 2)

    ours, exact = (jax.grad(loss, (0, 1))(arrays, state, dtype) for dtype in (jnp.bfloat16, None))
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(exact), strict=True):
        assert np.linalg.norm(one - other) < 0.03 * np.linalg.norm(other)


def test_rounding_per_token_loses_small_updates():
    """With values of mean 1 and slow decay the state grows; in bfloat16, with 8 bits, the update of
    a token is soon less than half of the last bit, and the state stops changing."""
    length = 4096
    arrays, _ = inputs(length, half_life=8192.0, mean=1.0)
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x, np.float64)) for x in arrays]
        exact = np.asarray(recurrence(*wide, method="scan")[0])

    def step(state, token):
        token = [x[:, None] for x in token]
        output, state = recurrence(*token, state, state_dtype=jnp.bfloat16, method="scan")
        return state, output[:, 0]

    start = jnp.zeros((B, H, K, V), jnp.bfloat16)
    _, outputs = jax.lax.scan(step, start, [x.swapaxes(0, 1) for x in arrays])
    by_token = np.asarray(outputs.swapaxes(0, 1), np.float64)
    by_chunk, in_float32 = (
        np.asarray(recurrence(*arrays, state_dtype=dtype)[0], np.float64)
        for dtype in (jnp.bfloat16, None)
    )
    late = slice(length - 256, None)
    assert relative_rms(by_token[:, late], exact[:, late]) > 0.5
    assert relative_rms(by_token[:, :64], exact[:, :64]) < 0.02
    assert 1e-3 < relative_rms(by_chunk[:, late], exact[:, late]) < 0.1
    assert relative_rms(in_float32[:, late], exact[:, late]) < 1e-3


def test_decodes_with_a_bfloat16_state():
    model = small_model("residual", state_precision="bfloat16")
    state = model.initial_state(2)[0].mixer
    assert state.dtype == jnp.bfloat16
    prompts = [[1, 2, 3], [5] * 70]
    whole = generate(model, prompts, max_new_tokens=9)
    first = generate(model, prompts, max_new_tokens=4)
    rest = generate(model, state=first.state, max_new_tokens=5)
    np.testing.assert_array_equal(whole.tokens[:, 4:], rest.tokens)
    assert whole.state.layers[0].mixer.dtype == jnp.bfloat16
    assert model.layers[0].mixer.cell.query_proj.kernel[...].dtype == jnp.float32
