"""Profiles of a run: which steps they hold, and that they are complete however it ends."""

import contextlib
from unittest import mock

import jax
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


@pytest.mark.parametrize("taken", [3, 9])
def test_a_profile_that_cannot_be_written_ends_no_run(tmp_path, events, monkeypatch, taken):
    problem = mock.Mock(side_effect=jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no space"))
    monkeypatch.setattr(profiling.jax.profiler, "stop_trace", problem)
    lines = []
    with Profile(str(tmp_path), 2, lines.append, contextlib.nullcontext) as profile:
        for number in range(taken):
            with profile.step(number, ()):
                events.append(number)
    assert events == [0, 1, "start", *range(2, taken)]
    assert lines == ["no profile: RESOURCE_EXHAUSTED: no space"]
    assert problem.call_count == 1


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize(
    ("steps", "taken", "expected", "said"),
    [
        (0, 4, [0, 1, 2, 3], None),
        (2, 6, [0, 1, "start", 2, 3, "stop", 4, 5], "profile of 2 steps: "),
        (2, 4, [0, 1, "start", 2, 3, "stop"], "profile of 2 steps: "),
        (9, 3, [0, 1, "start", 2, "stop"], "profile of 1 step: "),
        (1, 2, [0, 1], "no profile: the run ended within 2 steps of its start"),
    ],
)
def test_records_from_the_third_step_on(tmp_path, events, steps, taken, expected, said, fails):
    lines = []
    profile = Profile(str(tmp_path), steps, lines.append, contextlib.nullcontext)
    with contextlib.suppress(KeyboardInterrupt), profile:
        for number in range(taken):
            with profile.step(number, ()):
                events.append(number)
        if fails:
            raise KeyboardInterrupt
    assert events == expected
    assert len(lines) == (said is not None)
    assert all(line.startswith(said) for line in lines)
    if said and said.startswith("profile"):
        assert f": {tmp_path}/tensorboard/plugins/profile; " in lines[0]
        assert f"`tensorboard --logdir {tmp_path}` " in lines[0]  # whose name for a run is not "."
