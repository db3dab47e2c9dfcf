"""The summed cross entropy against explicit values, and what a mask leaves out."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simplernn_jax.training.losses import cross_entropy, summed_cross_entropy

LOGITS = jnp.log(jnp.array([[[1.0, 1.0, 2.0], [1.0, 3.0, 4.0], [5.0, 4.0, 1.0]]]))
TARGETS = jnp.array([[2, 0, 1]])


def test_is_the_sum_of_negative_log_probabilities():
    mask = jnp.ones((1, 3), bool)
    expected = -math.log(2 / 4) - math.log(1 / 8) - math.log(4 / 10)
    assert float(summed_cross_entropy(LOGITS, TARGETS, mask)) == pytest.approx(expected)


def test_every_position_has_its_own_loss():
    mask = jnp.array([[True, False, True]])
    expected = [[-math.log(2 / 4), 0, -math.log(4 / 10)]]
    np.testing.assert_allclose(cross_entropy(LOGITS, TARGETS, mask), expected, rtol=1e-6)


def test_a_constant_added_to_the_logits_changes_nothing():
    mask = jnp.ones((1, 3), bool)
    expected = -math.log(2 / 4) - math.log(1 / 8) - math.log(4 / 10)
    shifted = LOGITS + jnp.array([1e3, -1e3, 7.0])[None, :, None]
    assert float(summed_cross_entropy(shifted, TARGETS, mask)) == pytest.approx(expected, rel=1e-3)


def test_nothing_unmasked_is_zero():
    mask = jnp.zeros((1, 3), bool)
    value, gradient = jax.value_and_grad(summed_cross_entropy)(LOGITS, TARGETS, mask)
    assert float(value) == 0.0
    np.testing.assert_array_equal(gradient, 0.0)


@pytest.mark.parametrize("poison", [jnp.nan, jnp.inf, -jnp.inf, 3e38])
def test_masked_positions_count_nothing_whatever_their_logits_are(poison):
    mask = jnp.array([[True, False, True]])
    expected = -math.log(2 / 4) - math.log(4 / 10)
    value, gradient = jax.value_and_grad(summed_cross_entropy)(
        LOGITS.at[0, 1].set(poison), TARGETS, mask
    )
    assert float(value) == pytest.approx(expected)
    by_hand = np.array([[[0.25, 0.25, 0.5 - 1], [0, 0, 0], [0.5, 0.4 - 1, 0.1]]])
    np.testing.assert_allclose(gradient, by_hand, atol=1e-6)
