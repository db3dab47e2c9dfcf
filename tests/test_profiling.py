"""Profiles of a run: which steps they hold, and that they are complete however it ends."""

import contextlib

import pytest

from simplernn_jax.training import profiling
from simplernn_jax.training.profiling import Profile


@pytest.fixture
def events(monkeypatch):
    """Events in order, without a real profiler: only one may run per process."""
    events = []
    monkeypatch.setattr(profiling.jax.profiler, "start_trace", lambda _: events.append("start"))
    monkeypatch.setattr(profiling.jax.profiler, "stop_trace", lambda: events.append("stop"))
    return events


def take_steps(profile, events, count, fail_at=None):
    for number in range(count):
        if number == fail_at:
            raise KeyboardInterrupt
        with profile.step(number, ()):
            events.append(number)


@pytest.mark.parametrize(
    ("steps", "taken", "expected", "said"),
    [
        (0, 4, [0, 1, 2, 3], None),
        (2, 6, [0, 1, "start", 2, 3, "stop", 4, 5], "profile of 2 steps: "),
        (2, 4, [0, 1, "start", 2, 3, "stop"], "profile of 2 steps: "),
        (9, 4, [0, 1, "start", 2, 3, "stop"], "profile of 2 steps: "),
        (1, 2, [0, 1], "no profile: the run ended before its third step"),
    ],
)
def test_records_from_the_third_step_on(tmp_path, events, steps, taken, expected, said):
    lines = []
    with Profile(str(tmp_path), steps, lines.append, contextlib.nullcontext) as profile:
        take_steps(profile, events, taken)
    assert events == expected
    assert len(lines) == (said is not None)
    assert all(line.startswith(said) for line in lines)


def test_an_error_leaves_a_complete_profile(tmp_path, events):
    lines = []
    profile = Profile(str(tmp_path), 9, lines.append, contextlib.nullcontext)
    with pytest.raises(KeyboardInterrupt), profile:
        take_steps(profile, events, 9, fail_at=3)
    assert events == [0, 1, "start", 2, "stop"]
    assert lines[0].startswith(f"profile of 1 steps: {tmp_path}/tensorboard/plugins/profile; ")
