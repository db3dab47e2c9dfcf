"""Signals as requests."""

import signal

import jax
import pytest
from jax.experimental import multihost_utils

from simplernn_jax.training.loop import SIGNALS, deferred_signals


@pytest.fixture(autouse=True)
def usual_handlers():
    """Handlers of a script; a parallel test run changes them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_a_request(number):
    before = signal.getsignal(number)
    with deferred_signals() as poll_signal:
        assert poll_signal(3) is None
        signal.raise_signal(number)
        assert poll_signal(3) == signal.Signals(number).name
    assert signal.getsignal(number) == before


def test_the_second_signal_acts_as_before():
    with deferred_signals() as poll_signal:
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert poll_signal(3) == "SIGTERM"


def test_processes_of_a_distributed_run_ask_jax_which_step_is_the_last(monkeypatch):
    before = [signal.getsignal(number) for number in SIGNALS]
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    for last, expected in ((1, ["SIGTERM", None]), (2, [None, "SIGTERM"])):
        monkeypatch.setattr(
            multihost_utils, "reached_preemption_sync_point", lambda step, last=last: step == last
        )
        with deferred_signals() as poll_signal:
            assert [signal.getsignal(number) for number in SIGNALS] == before
            # As a run that resumes at step 20.
            assert [poll_signal(step) for step in (20, 21)] == expected
