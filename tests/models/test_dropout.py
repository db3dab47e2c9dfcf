"""Dropout keeps the right share of the values, and scales what it keeps."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simplernn_jax.models.layers import dropout


@pytest.mark.parametrize("rate", [0.03, 0.1, 0.5, 0.97])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_share_and_scale(rate, dtype):
    x = jnp.asarray(np.random.default_rng(0).uniform(1, 2, (7, 101, 331)), dtype)
    found = dropout(x, rate, jax.random.key(0))
    chex.assert_trees_all_equal_shapes_and_dtypes(found, x)
    kept = np.asarray(found != 0)
    np.testing.assert_allclose(
        found[kept], x[kept] / (1 - rate), rtol=1e-2 if x.itemsize == 2 else 1e-4
    )
    # Five standard deviations, of all values and of each last axis' position.
    for share, count in ((kept.mean(), kept.size), (kept.mean(axis=(0, 1)), kept[..., 0].size)):
        assert (abs(share - (1 - rate)) <= 5 * np.sqrt(rate / count) + 1e-9).all()


def test_values_are_independent():
    """Neighbors, whose bits come from one word, and the rows of a batch."""
    kept = np.asarray(dropout(jnp.ones((8, 512, 64)), 0.3, jax.random.key(1)) != 0) - 0.7
    for shifted in (kept[..., 1:] * kept[..., :-1], kept[1:] * kept[:-1]):
        assert abs(shifted.mean()) < 5 * 0.21 / np.sqrt(shifted.size)


def test_none_without_a_key_or_a_rate():
    x = jnp.ones((2, 3))
    assert dropout(x, 0.5, None) is x
    assert dropout(x, 0.0, jax.random.key(0)) is x


def test_rates_next_to_one_and_arrays_without_values():
    found = dropout(jnp.ones((64, 1024)), 1 - 2**-20, jax.random.key(0))
    assert 0 <= int((found != 0).sum()) < 20
    assert dropout(jnp.zeros((2, 0, 7)), 0.1, jax.random.key(0)).shape == (2, 0, 7)
