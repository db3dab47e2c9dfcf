"""Signals as requests."""

import signal

import pytest

from simplernn_jax.training.interruption import SIGNALS, deferred_signals


@pytest.fixture(autouse=True)
def usual_handlers():
    """Handlers of a script; a parallel test run changes them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_a_request(number):
    before = signal.getsignal(number)
    with deferred_signals() as received:
        assert received() is None
        signal.raise_signal(number)
        assert received() == signal.Signals(number).name
    assert signal.getsignal(number) == before


def test_the_second_signal_acts_as_before():
    with deferred_signals() as received:
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert received() == "SIGTERM"


def test_without_a_signal_the_handlers_are_restored():
    before = [signal.getsignal(number) for number in SIGNALS]
    with deferred_signals():
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before
