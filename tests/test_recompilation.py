"""The count of recompilations, of a small function and of a train step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simplernn_jax.training.recompilation import CountedCalls


@pytest.fixture
def double():
    with CountedCalls("double", jax.jit(lambda x: 2 * x)) as double:
        yield double


def test_the_first_call_and_the_same_shape_do_not_count(double, caplog):
    for number in range(3):
        np.testing.assert_array_equal(double(jnp.full((5,), number)), np.full((5,), 2 * number))
    assert double.recompilations == 0
    assert not caplog.records


@pytest.mark.parametrize(
    "other", [np.ones((7,), np.float32), np.ones((5,), np.int32)], ids=["shape", "dtype"]
)
def test_another_shape_or_dtype_counts_once_and_is_said(double, caplog, other):
    usual = np.ones((5,), np.float32)
    for x in (usual, usual, other, usual, other):
        double(x)
    assert double.recompilations == 1
    (record,) = caplog.records
    assert record.getMessage().startswith("double was compiled again, in its call 3: ")


def test_what_others_compile_does_not_count(double):
    double(jnp.ones(5))
    jax.jit(lambda x: x + 3)(jnp.ones(11))
    double(jnp.ones(5))
    assert double.recompilations == 0


def test_it_listens_only_while_it_is_entered(caplog):
    counted = CountedCalls("triple", jax.jit(lambda x: 3 * x))
    with counted:
        counted(np.ones(5))
    counted(np.ones(7))
    assert counted.recompilations == 0
