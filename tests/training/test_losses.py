"""The summed cross entropy against explicit values, and masks."""

import math

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from simplernn_jax.training import losses
from simplernn_jax.training.losses import chunked_cross_entropy, cross_entropy


def summed_cross_entropy(*args):
    return jnp.sum(cross_entropy(*args))


LOGITS = jnp.log(jnp.array([[[1.0, 1.0, 2.0], [1.0, 3.0, 4.0], [5.0, 4.0, 1.0]]]))
TARGETS = jnp.array([[2, 0, 1]])


@pytest.mark.parametrize("shift", [0.0, [1e3, -1e3, 7.0]])
def test_is_the_negative_log_probability_whatever_is_added_to_the_logits(shift):
    logits = LOGITS + jnp.broadcast_to(jnp.array(shift), 3)[None, :, None]
    expected = [[-math.log(2 / 4), -math.log(1 / 8), -math.log(4 / 10)]]
    found = cross_entropy(logits, TARGETS, jnp.ones((1, 3), bool))
    np.testing.assert_allclose(found, expected, rtol=1e-3 if shift else 1e-6)


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


@pytest.mark.parametrize("at_once", [10**9, 40, 1])
def test_chunks_of_time_give_the_same_loss_and_gradient(monkeypatch, at_once):
    monkeypatch.setattr(losses, "MAX_LOGITS", at_once)
    random = np.random.default_rng(0)
    hidden, head = random.normal(size=(2, 13, 3)), random.normal(size=(3, 5))
    targets, mask = random.integers(0, 5, (2, 13)), random.random((2, 13)) < 0.7

    def of(hidden, head):
        return jnp.sum(chunked_cross_entropy(lambda x: x @ head, hidden, targets, mask))

    def at_once_of(hidden, head):
        return summed_cross_entropy(hidden @ head, targets, mask)

    with jax.enable_x64(True):
        inputs = jnp.asarray(hidden), jnp.asarray(head)
        found = jax.value_and_grad(of, argnums=(0, 1))(*inputs)
        expected = jax.value_and_grad(at_once_of, argnums=(0, 1))(*inputs)
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-13)
        largest = max(
            value.aval.size
            for equation in jax.make_jaxpr(of)(*inputs).jaxpr.eqns
            for value in equation.outvars
        )
    assert largest < 2 * 13 * 5 or at_once == 10**9


@pytest.mark.oldest_python
def test_arguments_are_checked_against_annotations():
    logits, targets = jnp.zeros((2, 3, 5)), jnp.zeros((2, 3), jnp.int32)
    # Within pytest.raises the checks are off.
    with pytest.RaisesExc(jaxtyping.TypeCheckError, match="parameter 'targets'"):
        cross_entropy(logits, targets[..., None], targets == 0)
