"""Profiles of a run: which steps they hold, and that they are complete however it ends."""

import contextlib

import pytest

from simplernn_jax.training import profiling
from simplernn_jax.training.profiling import Profile


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize(
    ("steps", "taken", "expected", "said"),
    [
        (0, 4, [0, 1, 2, 3], None),
        (2, 6, [0, 1, "start", 2, 3, "stop", 4, 5], "profile of 2 steps: "),
        (9, 3, [0, 1, "start", 2, "stop"], "profile of 1 step: "),
        (1, 2, [0, 1], None),
    ],
)
def test_records_from_the_third_step_on(tmp_path, monkeypatch, steps, taken, expected, said, fails):
    events, lines = [], []
    monkeypatch.setattr(profiling.jax.profiler, "start_trace", lambda _: events.append("start"))
    monkeypatch.setattr(profiling.jax.profiler, "stop_trace", lambda: events.append("stop"))
    profile = Profile(str(tmp_path), steps, lines.append)
    with contextlib.suppress(KeyboardInterrupt), profile:
        for number in range(taken):
            with profile.step(number, ()):
                events.append(number)
        if fails:
            raise KeyboardInterrupt
    assert events == expected
    assert [line.startswith(said) for line in lines] == [True] * (said is not None)
    assert all(f": {tmp_path}/tensorboard/plugins/profile; " in line for line in lines)
