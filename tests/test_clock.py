"""What the clock of a run counts, with a time of our own."""

import pytest

from simplernn_jax.training import clock as clock_module
from simplernn_jax.training.clock import Clock


@pytest.fixture
def wait(monkeypatch):
    """Lets time pass."""
    now = [100.0]
    monkeypatch.setattr(clock_module.time, "monotonic", lambda: now[0])

    def pass_seconds(seconds):
        now[0] += seconds

    return pass_seconds


def test_speed_is_that_of_the_steps_after_the_first(wait):
    clock = Clock(seconds_before=500)
    wait(50)
    clock.start()
    wait(30)  # compilation
    clock.tick(tokens=1000)
    assert (clock.first, clock.tokens_per_second) == (30, 0)
    for _ in range(4):
        wait(2)
        clock.tick(tokens=1000)
    assert clock.tokens_per_second == pytest.approx(500)
    assert clock.seconds_per_step == pytest.approx(2)
    assert clock.seconds == pytest.approx(38)
    assert clock.total_seconds == pytest.approx(538)


def test_pauses_do_not_count(wait):
    clock = Clock()
    clock.start()
    for _ in range(3):
        wait(2)
        clock.tick(tokens=10)
        with clock.paused():
            wait(1000)
    clock.stop()
    wait(1000)
    clock.stop()
    assert clock.seconds == pytest.approx(6)
    assert clock.tokens_per_second == pytest.approx(5)


def test_a_clock_that_never_ran_has_no_speed():
    assert (Clock().tokens_per_second, Clock().seconds_per_step) == (0, 0)
