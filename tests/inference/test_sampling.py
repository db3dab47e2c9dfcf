"""Sampling as a pure function: what can be drawn, how often, and that no setting gives NaN."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simplernn_jax.inference.sampling import Sampling, greedy, mask_logits, sample

VOCAB = 13
DRAWS = 4001

jitted_sample = jax.jit(sample)


def draws(logits, num=DRAWS, **kwargs):
    """`num` draws from one row of logits."""
    rows = jnp.tile(jnp.asarray(logits, jnp.float32)[None], (num, 1))
    keys = jax.random.split(jax.random.key(3), num)
    return np.asarray(jitted_sample(rows, keys, settings_of(**kwargs)))


def settings_of(**settings):
    """Settings that all sequences share."""
    return jax.tree.map(lambda setting: setting[None], Sampling(**settings).arrays(VOCAB))


def random_logits(seed=0):
    return np.random.default_rng(seed).normal(size=VOCAB).astype(np.float32) * 2


def softmax(logits):
    exponentials = np.exp(logits - logits.max())
    return exponentials / exponentials.sum()


def test_temperature_zero_is_greedy_and_takes_the_lowest_of_equal_ids():
    logits = jnp.asarray([[0.0, 2.0, 2.0], [5.0, -1.0, 5.0], [-3.0, -2.0, -1.0]])
    keys = jax.random.split(jax.random.key(0), 3)
    np.testing.assert_array_equal(sample(logits, keys, settings_of()), [1, 0, 2])
    np.testing.assert_array_equal(greedy(logits), [1, 0, 2])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_frequencies_follow_the_tempered_softmax(temperature):
    logits = random_logits()
    frequencies = np.bincount(draws(logits, temperature=temperature), minlength=VOCAB) / DRAWS
    np.testing.assert_allclose(frequencies, softmax(logits / temperature), atol=0.03)


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_top_k_draws_from_exactly_the_k_best(top_k):
    logits = random_logits()
    drawn = draws(logits, temperature=2.0, top_k=top_k)
    assert set(drawn) == set(np.argsort(-logits)[:top_k])


def test_top_k_keeps_exactly_k_of_equal_logits():
    kept = mask_logits(jnp.zeros((2, VOCAB)), 3, 1.0)
    np.testing.assert_array_equal(np.isfinite(kept).sum(-1), [3, 3])
    np.testing.assert_array_equal(np.flatnonzero(np.isfinite(kept[0])), [0, 1, 2])


@pytest.mark.parametrize(("top_p", "expected"), [(0.4, 1), (0.5, 1), (0.51, 2), (0.8, 3), (1.0, 4)])
def test_top_p_keeps_the_fewest_best_that_reach_it(top_p, expected):
    # Shuffled, and powers of two, so that the sums are exact.
    logits = jnp.log(jnp.asarray([[0.125, 0.5, 0.125, 0.25]]))
    kept = np.isfinite(mask_logits(logits, 0, top_p))[0]
    assert kept.sum() == expected
    assert kept[1]


def test_top_p_counts_after_top_k():
    logits = jnp.log(jnp.asarray([[0.5, 0.25, 0.125, 0.125]]))
    # Of the two best the first has 2/3: it alone reaches 0.6, though only 0.5 of all.
    np.testing.assert_array_equal(np.isfinite(mask_logits(logits, 2, 0.6))[0], [1, 0, 0, 0])
    np.testing.assert_array_equal(np.isfinite(mask_logits(logits, 0, 0.6))[0], [1, 1, 0, 0])


@pytest.mark.parametrize("temperature", [1e-45, 1e-38, 1e-6, 1e6, 3e38])
@pytest.mark.parametrize("top_p", [1e-30, 0.9, 1.0])
def test_extreme_settings_draw_allowed_ids_only(temperature, top_p):
    logits = np.full(VOCAB, -np.inf, np.float32)
    logits[[2, 5, 11]] = [-3e38, 1.0, 3e37]
    drawn = draws(logits, num=97, temperature=temperature, top_p=top_p)
    assert set(drawn) <= {2, 5, 11}
    if temperature <= 1e-6 or top_p < 0.1:
        assert set(drawn) == {11}
