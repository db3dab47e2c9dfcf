"""Statistics of the steps of a run: tokens, mean loss, time and speed."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

from absl import logging
from jax import monitoring


@dataclasses.dataclass
class LossTotals:
    """Tokens and loss, summed over steps and saved with every checkpoint.

    Metrics after a resume are therefore those of an uninterrupted run.
    """

    tokens: int = 0
    """Predictions since step 0."""
    loss_sum: float = 0.0
    """Nats of all predictions since `pop_mean_loss`, excluding skipped updates."""
    loss_tokens: int = 0
    """Number of these predictions."""

    def add(self, loss: float, predictions: int, *, skipped: bool) -> None:
        """Add a step of `loss` nats per prediction; a `skipped` update counts its tokens only."""
        self.tokens += predictions
        if not skipped:
            self.loss_sum += loss * predictions
            self.loss_tokens += predictions

    def pop_mean_loss(self) -> float:
        """Return nats per prediction since the last call; NaN if all updates were skipped."""
        mean = self.loss_sum / self.loss_tokens if self.loss_tokens else math.nan
        self.loss_sum, self.loss_tokens = 0.0, 0
        return mean


class StepTimer:
    """Training time without evaluations, samples and saves; speed without the first step."""

    def __init__(self, seconds_before: float = 0.0) -> None:
        """Start at 0; `seconds_before` is the training time before the run was resumed."""
        self.seconds = 0.0
        self.first = 0.0
        """Seconds of the first step, compilation included."""
        self._before = seconds_before
        self._steps = 0
        self._tokens = 0
        self._since: float | None = None

    def start(self) -> None:
        """Start or resume the timer."""
        self._since = time.monotonic()

    def stop(self) -> None:
        """Pause the timer until `start`."""
        if self._since is not None:
            self.seconds += time.monotonic() - self._since
            self._since = None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the timer inside the ``with`` block."""
        self.stop()
        try:
            yield
        finally:
            self.start()

    def tick(self, tokens: int) -> None:
        """Count a finished step."""
        self.stop()
        self.start()
        self._steps += 1
        if self._steps == 1:
            self.first = self.seconds
        else:
            self._tokens += tokens

    @property
    def total_seconds(self) -> float:
        """Training time of the whole run, to the millisecond."""
        return round(self._before + self.seconds, 3)

    @property
    def seconds_per_step(self) -> float:
        """Mean seconds per step, excluding the first step."""
        return (self.seconds - self.first) / max(self._steps - 1, 1)

    @property
    def tokens_per_second(self) -> float:
        """Target tokens per second, mean over all steps but the first."""
        seconds = self.seconds - self.first
        return self._tokens / seconds if seconds > 0 else 0.0


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
