"""Sums over steps, the timer and the count of recompilations."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simplernn_jax.training import reporter
from simplernn_jax.training.progress import LossTotals
from simplernn_jax.training.reporter import RecompilationCounter, StepTimer


def test_the_mean_loss_is_weighted_by_tokens_and_starts_anew():
    totals = LossTotals()
    totals.add(2.0, 30, skipped=False)
    totals.add(5.0, 10, skipped=False)
    resumed = LossTotals(**dataclasses.asdict(totals))
    assert resumed.pop_mean_loss() == totals.pop_mean_loss() == (2.0 * 30 + 5.0 * 10) / 40
    totals.add(1.5, 7, skipped=False)
    assert totals.pop_mean_loss() == 1.5
    assert totals.tokens == 47


def test_a_skipped_update_counts_tokens_and_no_loss():
    totals = LossTotals()
    totals.add(math.nan, 30, skipped=True)
    assert math.isnan(totals.pop_mean_loss())
    totals.add(math.inf, 30, skipped=True)
    totals.add(2.0, 5, skipped=False)
    assert totals.pop_mean_loss() == 2.0
    assert totals.tokens == 65


@pytest.fixture
def wait(monkeypatch):
    """Lets time pass."""
    now = [100.0]
    monkeypatch.setattr(reporter.time, "monotonic", lambda: now[0])

    def pass_seconds(seconds):
        now[0] += seconds

    return pass_seconds


def test_speed_excludes_the_first_step(wait):
    timer = StepTimer(seconds_before=500)
    assert (timer.tokens_per_second, timer.seconds_per_step) == (0, 0)
    wait(50)
    timer.start()
    wait(30)  # compilation
    timer.tick(tokens=1000)
    assert (timer.first, timer.tokens_per_second) == (30, 0)
    for _ in range(4):
        wait(2)
        timer.tick(tokens=1000)
    assert timer.tokens_per_second == pytest.approx(500)
    assert timer.seconds_per_step == pytest.approx(2)
    assert timer.seconds == pytest.approx(38)
    assert timer.total_seconds == pytest.approx(538)


def test_pauses_do_not_count(wait):
    timer = StepTimer()
    timer.start()
    for _ in range(3):
        wait(2)
        timer.tick(tokens=10)
        with timer.paused():
            wait(1000)
    timer.stop()
    wait(1000)
    timer.stop()
    assert timer.seconds == pytest.approx(6)
    assert timer.tokens_per_second == pytest.approx(5)


@pytest.mark.parametrize(
    ("other", "count"),
    [
        (np.full((5,), 7, np.float32), 0),
        (np.ones((7,), np.float32), 1),
        (np.ones((5,), np.int32), 1),
    ],
    ids=["same", "shape", "dtype"],
)
def test_another_shape_or_dtype_is_one_recompilation_and_logged(caplog, other, count):
    usual = np.ones((5,), np.float32)
    with RecompilationCounter(jax.jit(lambda x: 2 * x)) as double:
        for x in (usual, usual, other, usual, other):
            np.testing.assert_array_equal(double(x), 2 * x)
            jax.jit(lambda x: x + 3)(jnp.ones(11))  # compiled by others: does not count
    double(np.ones((9,), np.float32))  # neither does what it compiles after the ``with`` block
    assert double.recompilations == count
    messages = [
        "the train step was recompiled at call 3: shapes, dtypes and shardings should be constant"
    ]
    assert caplog.messages == messages[:count]
