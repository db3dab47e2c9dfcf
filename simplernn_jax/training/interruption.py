"""SIGTERM and SIGINT as requests that the training loop reads between steps."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

SIGNALS = (signal.SIGTERM, signal.SIGINT)

PollSignal = Callable[[int], str | None]
"""Returns the name of the signal that ends the run at a step, or None; called before each step."""


@contextlib.contextmanager
def deferred_signals() -> Iterator[PollSignal]:
    """Turn the first signal into a request; a second signal goes to the previous handler.

    In a distributed run, JAX's preemption service handles SIGTERM, and all processes agree on the
    step at which a signal to any of them ends the run.
    """
    if jax.distributed.is_initialized():
        first: list[int] = []

        def poll(step: int) -> str | None:
            # From 1 in every process: of a signal before the first call, JAX makes 1 the last step.
            first[:] = first or [step]
            is_last = multihost_utils.reached_preemption_sync_point(step - first[0] + 1)
            return "SIGTERM" if is_last else None

        yield poll
        return
    received: list[str] = []
    previous: dict[int, Any] = {number: signal.getsignal(number) for number in SIGNALS}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def request(number: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(number).name)
        restore()

    for number in SIGNALS:
        signal.signal(number, request)
    try:
        yield lambda step: received[0] if received else None
    finally:
        restore()
