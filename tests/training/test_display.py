"""What a run prints: progress and lines, and the speed of its steps."""

import pytest

from simplernn_jax.training import display as module
from simplernn_jax.training.display import Display, StepTimer


@pytest.fixture
def wait(monkeypatch):
    """Lets time pass."""
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])

    def pass_seconds(seconds):
        now[0] += seconds

    return pass_seconds


def test_lines_come_at_most_every_few_seconds(wait, capsys):
    display = Display(40)
    for step in range(1, 7):
        display.update(step, 1.23456 + step, 12345.6 * (step > 1), 65.0 if step < 6 else 3725.0)
        wait(2 if step < 4 else 3)
    display.print_line("[bold] says the sample")
    assert capsys.readouterr().out.splitlines() == [
        "step 1/40  loss 2.2346",
        "step 4/40  loss 4.2346  12,346 tokens/s  1:05 left",
        "step 6/40  loss 6.7346  12,346 tokens/s  1:02:05 left",
        "[bold] says the sample",
    ]


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
    for _ in range(3):
        wait(2)
        timer.tick(tokens=10)
        with timer.paused():
            wait(1000)
    wait(1000)
    assert timer.seconds == pytest.approx(6)
    assert timer.tokens_per_second == pytest.approx(5)
