"""Counts how often a compiled function had to be compiled again."""

from collections.abc import Callable
from types import TracebackType
from typing import Generic, ParamSpec, TypeVar

from absl import logging
from jax import monitoring

_EVENT = "/jax/core/compile/backend_compile_duration"
"""Comes whenever a program is compiled, or loaded from the compilation cache."""

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


class CountedCalls(Generic[_Arguments, _Result]):
    """A function whose calls compile nothing but the first; if one does, a warning says so.

    Counted by JAX's own events, so that every cause shows: another shape, dtype, sharding or
    option. Only while it is entered; what is compiled between calls does not count.
    """

    def __init__(self, name: str, function: Callable[_Arguments, _Result]) -> None:
        self.recompilations = 0
        """Compilations in all calls but the first."""
        self._name = name
        self._function = function
        self._calls = 0
        self._compilations = 0

    def __enter__(self) -> "CountedCalls[_Arguments, _Result]":
        monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        monitoring.unregister_event_duration_listener(self._listen)

    def __call__(self, *args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        """Calls the function."""
        before = self._compilations
        result = self._function(*args, **kwargs)
        new = self._compilations - before
        if self._calls and new:
            self.recompilations += new
            logging.warning(
                "%s was compiled again, in its call %d: shapes and dtypes should never change",
                *(self._name, self._calls + 1),
            )
        self._calls += 1
        return result

    def _listen(self, event: str, duration_secs: float, **_: str | int) -> None:
        self._compilations += event == _EVENT
