"""The convolution of normalised inputs against a loop over tokens, its state and its segments."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from simplernn_jax.models.short_convolution import ShortConvolution
from simplernn_jax.ops.rms_norm import rms_norm

BATCH, LENGTH, FEATURES, WIDTH = 2, 11, 5, 4


def convolution() -> ShortConvolution:
    layer = ShortConvolution(WIDTH, FEATURES, rngs=nnx.Rngs(0))
    layer.weights.set_value(jax.random.normal(jax.random.key(1), (WIDTH, FEATURES)))
    return layer


def inputs(length: int = LENGTH) -> jax.Array:
    return jax.random.normal(jax.random.key(2), (BATCH, length, FEATURES))


def token_by_token(layer, x, segment_ids):
    """The definition: a sum over lags that stops at the segment's start."""
    x, kernel = np.asarray(rms_norm(x)), np.asarray(layer.weights[...])
    y = np.zeros_like(x)
    for row in range(x.shape[0]):
        for t in range(x.shape[1]):
            for lag in range(min(WIDTH, t + 1)):
                if lag and segment_ids[row, t - lag] != segment_ids[row, t - lag + 1]:
                    break
                y[row, t] += kernel[lag] * x[row, t - lag]
    return y


def test_starts_as_the_norm_alone():
    layer = ShortConvolution(WIDTH, FEATURES, rngs=nnx.Rngs(0))
    y, _ = layer(inputs(), layer.initial_state(BATCH), None)
    chex.assert_trees_all_close(y, rms_norm(inputs()), rtol=1e-6)


@pytest.mark.parametrize(
    "segment_ids",
    [
        np.zeros((BATCH, LENGTH), np.int32),
        # The id 7 comes back after one token, and what came before it stays out of reach.
        np.asarray([[7, 7, 8, 7, 7, 7, 7, 7, 9, 9, 9], [0, 0, 0, 0, 0, 1, 2, 3, 3, 3, 3]]),
        np.tile(np.arange(LENGTH), (BATCH, 1)),
    ],
    ids=["one", "several", "every token"],
)
def test_equals_the_definition(segment_ids):
    layer = convolution()
    y, _ = layer(inputs(), layer.initial_state(BATCH), jnp.asarray(segment_ids))
    chex.assert_trees_all_close(y, token_by_token(layer, inputs(), segment_ids), rtol=1e-5)


def test_without_segment_ids_it_is_one_segment():
    layer = convolution()
    zeros = jnp.zeros((BATCH, LENGTH), jnp.int32)
    with_ids = layer(inputs(), layer.initial_state(BATCH), zeros)
    chex.assert_trees_all_equal(layer(inputs(), layer.initial_state(BATCH), None), with_ids)


@pytest.mark.parametrize("lengths", [(0, 11), (1,) * 11, (2, 9), (5, 1, 5), (11, 0)])
def test_pieces_equal_the_whole(lengths):
    layer = convolution()
    # Boundaries inside the remembered tokens, too.
    segment_ids = jnp.asarray([[0, 0, 0, 0, 0, 1, 1, 1, 2, 3, 3], [0] * 10 + [1]])
    whole, end = layer(inputs(), layer.initial_state(BATCH), segment_ids)
    state, parts, start = layer.initial_state(BATCH), [], 0
    for length in lengths:
        piece = slice(start, start + length)
        if start and length:
            # A boundary between two pieces is the caller's to clear, as with the recurrence.
            changed = segment_ids[:, start] != segment_ids[:, start - 1]
            state = jnp.where(changed[:, None, None], 0, state)
        y, state = layer(inputs()[:, piece], state, segment_ids[:, piece])
        parts.append(y)
        start += length
    chex.assert_trees_all_close(jnp.concatenate(parts, axis=1), whole, rtol=1e-6)
    chex.assert_trees_all_equal(state, end)


def test_the_state_forgets_what_lies_behind_a_boundary():
    layer = convolution()
    segment_ids = jnp.asarray([[0] * 10 + [1], [0] * 11])
    _, state = layer(inputs(), layer.initial_state(BATCH), segment_ids)
    expected = np.asarray(rms_norm(inputs()))[:, -3:].copy()
    expected[0, :2] = 0
    chex.assert_trees_all_close(state, expected, rtol=1e-6)
