"""The checks of conftest.py are on: annotations at run time, and strict promotion of dtypes."""

import jax
import jax.numpy as jnp
import jaxtyping
import pytest

from simplernn_jax.training.losses import cross_entropy


@pytest.mark.oldest_python
def test_arguments_are_checked_against_annotations():
    logits, targets = jnp.zeros((2, 3, 5)), jnp.zeros((2, 3), jnp.int32)
    # Within pytest.raises the checks are off.
    with pytest.RaisesExc(jaxtyping.TypeCheckError, match="parameter 'targets'"):
        cross_entropy(logits, targets[..., None], targets == 0)


def test_dtypes_are_not_promoted():
    with pytest.raises(jax.dtypes.TypePromotionError, match="bfloat16"):
        jnp.zeros(2) + jnp.zeros(2, jnp.bfloat16)
