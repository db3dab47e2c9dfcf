"""SIGTERM and SIGINT as a request that the training loop reads between steps."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import jax

SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextlib.contextmanager
def deferred_signals() -> Iterator[Callable[[], str | None]]:
    """Turn the first signal into a request; a second one acts as it did before.

    With several processes, JAX's preemption service handles signals (`PreemptionSync`).

    Yields:
      A function that returns the name of the signal that came, or None.
    """
    received: list[str] = []
    previous: dict[int, Any] = {}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def request(number: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(number).name)
        restore()

    if not jax.distributed.is_initialized():
        previous |= {number: signal.getsignal(number) for number in SIGNALS}
        for number in SIGNALS:
            signal.signal(number, request)
    try:
        yield lambda: received[0] if received else None
    finally:
        restore()
