"""Recompilations of a jitted function."""

from collections.abc import Callable
from typing import Any

from absl import logging
from jax import monitoring


class RecompilationCounter:
    """Wrap a jitted function; count its recompilations and warn about them.

    Counted by JAX's own events, so that every cause is detected: a new shape, dtype, sharding or
    option. Counts only inside the ``with`` block, and only what its calls compile.
    """

    _EVENT = "/jax/core/compile/backend_compile_duration"
    """Sent for every program that is compiled or loaded from the compilation cache."""

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.recompilations = 0
        """Compilations in all calls but the first."""
        self._name = name
        self._function = function
        self._calls = 0
        self._compilations = 0

    def __enter__(self) -> "RecompilationCounter":
        monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def __exit__(self, *_: object) -> None:
        monitoring.unregister_event_duration_listener(self._listen)

    def __call__(self, *args: Any) -> Any:
        """Call the function."""
        before = self._compilations
        result = self._function(*args)
        new = self._compilations - before
        if self._calls and new:
            self.recompilations += new
            logging.warning(
                "%s was recompiled at call %d: shapes, dtypes and shardings should be constant",
                *(self._name, self._calls + 1),
            )
        self._calls += 1
        return result

    def _listen(self, event: str, duration_secs: float, **_: str | int) -> None:
        self._compilations += event == self._EVENT
