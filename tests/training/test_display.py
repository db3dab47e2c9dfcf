"""What a run prints: progress and lines, and the speed of its steps."""

import io
import sys

import pytest

from simplernn_jax.training import display as module
from simplernn_jax.training.display import StepTimer, open_display


@pytest.fixture
def wait(monkeypatch):
    """Lets time pass."""
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])

    def pass_seconds(seconds):
        now[0] += seconds

    return pass_seconds


class Terminal(io.StringIO):
    encoding = "UTF-8"

    def isatty(self):
        return True


def test_lines_come_at_most_every_few_seconds(wait, capsys):
    with open_display(0, 40) as display:
        for step in range(1, 7):
            display.update(step, 1.23456 + step, 12345.6 * (step > 1), 65.0)
            wait(2)
        display.print_line("[bold] says the sample")
    assert capsys.readouterr().out.splitlines() == [
        "step 1/40  loss 2.2346",
        "step 4/40  loss 4.2346  12,346 tokens/s  1:05 left",
        "[bold] says the sample",
    ]


def test_a_terminal_shows_a_bar_and_lines_above_it(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    with open_display(10, 40) as display:
        display.update(11, 2.5, 0.0, 0.0)
        display.update(20, 1.23456, 12345.6, 3725.0)
        display.print_line("[bold] says the sample")
    shown = terminal.getvalue()
    assert "20/40" in shown
    assert "loss 1.2346  12,346 tokens/s  1:02:05 left" in shown
    assert "[bold] says the sample\n" in shown


def test_a_terminal_that_cannot_draw_gets_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    with open_display(0, 40) as display:
        display.update(1, 2.5, 0.0, 0.0)
        display.print_line("done")
    assert terminal.getvalue() == "step 1/40  loss 2.5000\ndone\n"


def test_speed_excludes_the_first_step_and_pauses(wait):
    timer = StepTimer(seconds_before=500)
    assert (timer.tokens_per_second, timer.seconds_per_step) == (0, 0)
    wait(30)  # compilation
    timer.tick(tokens=1000)
    assert (timer.first, timer.tokens_per_second) == (30, 0)
    for _ in range(4):
        wait(2)
        timer.tick(tokens=1000)
        with timer.paused():
            wait(1000)
    assert timer.tokens_per_second == pytest.approx(500)
    assert timer.seconds_per_step == pytest.approx(2)
    assert timer.seconds == pytest.approx(38)
    assert timer.total_seconds == pytest.approx(538)
