"""Turns SIGTERM and SIGINT into a request that the loop reads between steps."""

import signal
from types import FrameType, TracebackType
from typing import Any

import jax


class Interruption:
    """While entered, the first signal sets `requested`; a second one acts as it always does.

    With several processes, JAX's preemption service handles signals (`PreemptionSync`).
    """

    signals = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.requested: str | None = None
        """Name of the signal that came, or None."""
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        if jax.distributed.is_initialized():
            return self
        for number in self.signals:
            self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
