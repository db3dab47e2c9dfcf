"""Signals as requests."""

import signal

import pytest

from simplernn_jax.training.interruption import Interruption


@pytest.fixture(autouse=True)
def usual_handlers():
    """Those of a script; a parallel test run changes them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_a_request(number):
    before = signal.getsignal(number)
    with Interruption() as interruption:
        assert interruption.requested is None
        signal.raise_signal(number)
        assert interruption.requested == signal.Signals(number).name
    assert signal.getsignal(number) == before


def test_the_second_signal_acts_as_it_always_does():
    with Interruption() as interruption:
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert interruption.requested == "SIGTERM"


def test_without_a_signal_the_handlers_come_back():
    before = [signal.getsignal(number) for number in Interruption.signals]
    with Interruption():
        assert [signal.getsignal(number) for number in Interruption.signals] != before
    assert [signal.getsignal(number) for number in Interruption.signals] == before
