"""The short convolution layer against loops, its state and its segments."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from references import convolve_by_loops, run_in_pieces

from simplernn_jax.models.convolution import ShortConvolution
from simplernn_jax.ops.rms_norm import rms_norm
from simplernn_jax.ops.segments import segment_starts

BATCH, LENGTH, FEATURES, WIDTH = 2, 11, 5, 4


def convolution() -> ShortConvolution:
    layer = ShortConvolution(WIDTH, FEATURES, rngs=nnx.Rngs(0), normalize=True)
    layer.weights.set_value(jax.random.normal(jax.random.key(1), (WIDTH, FEATURES)))
    return layer


def inputs(length: int = LENGTH) -> jax.Array:
    return jax.random.normal(jax.random.key(2), (BATCH, length, FEATURES))


def test_is_initialized_as_the_norm():
    layer = ShortConvolution(WIDTH, FEATURES, rngs=nnx.Rngs(0), normalize=True)
    y, _ = layer(inputs(), layer.initial_state(BATCH), None)
    chex.assert_trees_all_close(y, rms_norm(inputs()), rtol=1e-6)


@pytest.mark.parametrize(
    "segment_ids",
    [
        np.zeros((BATCH, LENGTH), np.int32),
        # The id 7 occurs again after one token, as another segment.
        np.asarray([[7, 7, 8, 7, 7, 7, 7, 7, 9, 9, 9], [0, 0, 0, 0, 0, 1, 2, 3, 3, 3, 3]]),
        np.tile(np.arange(LENGTH), (BATCH, 1)),
    ],
    ids=["one", "several", "every token"],
)
def test_equals_the_definition(segment_ids):
    layer, segment_ids = convolution(), jnp.asarray(segment_ids, jnp.int32)
    state = layer.initial_state(BATCH)
    y, _ = layer(inputs(), state, segment_ids)
    arrays = map(np.asarray, (inputs(), layer.weights[...], state, segment_starts(segment_ids)))
    chex.assert_trees_all_close(y, convolve_by_loops(*arrays)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.fewer_cases
@pytest.mark.parametrize("lengths", [(1,) * 11, (0, 2, 1, 5, 3, 0)])
def test_pieces_equal_the_whole_sequence(lengths):
    layer = convolution()
    # Boundaries inside the state's tokens, too.
    segment_ids = jnp.asarray([[0, 0, 0, 0, 0, 1, 1, 1, 2, 3, 3], [0] * 10 + [1]])
    whole, end = layer(inputs(), layer.initial_state(BATCH), segment_ids)
    y, state = run_in_pieces(ShortConvolution.__call__, layer, inputs(), segment_ids, lengths)
    chex.assert_trees_all_close(y, whole, rtol=1e-6)
    chex.assert_trees_all_equal(state, end)


def test_state_is_of_the_last_segment():
    layer = convolution()
    segment_ids = jnp.asarray([[0] * 10 + [1], [0] * 11])
    _, state = layer(inputs(), layer.initial_state(BATCH), segment_ids)
    expected = np.asarray(rms_norm(inputs()))[:, -3:].copy()
    expected[0, :2] = 0
    chex.assert_trees_all_close(state, expected, rtol=1e-6)
