"""Statistics of the steps of a run: tokens, mean loss, time, speed and recompilations."""

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

from absl import logging
from jax import monitoring


@dataclasses.dataclass
class LossTotals:
    """Tokens and loss, summed over steps and saved with every checkpoint.

    Metrics after a resume are therefore those of a run without an interruption.
    """

    tokens: int | None = 0
    """Predictions since step 0; None if the run began in a version that did not count them."""
    loss_sum: float = 0.0
    """Nats of all predictions since `take_mean_loss`, skipped updates left out."""
    loss_tokens: int = 0
    """Number of these predictions."""

    def add(self, loss: float, predictions: int, *, skipped: bool) -> None:
        """Add a step.

        Args:
          loss: nats per prediction.
          predictions: number of predictions in the batch.
          skipped: the update was skipped, because the loss or its gradient was not finite.
        """
        if self.tokens is not None:
            self.tokens += predictions
        if not skipped:
            self.loss_sum += loss * predictions
            self.loss_tokens += predictions

    def take_mean_loss(self) -> float:
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
        """Start or continue."""
        self._since = time.monotonic()

    def stop(self) -> None:
        """Stop, until `start`."""
        if self._since is not None:
            self.seconds += time.monotonic() - self._since
            self._since = None

    def paused(self) -> "StepTimer":
        """Return a context manager that stops the timer inside its ``with`` block."""
        return self

    def __enter__(self) -> None:
        self.stop()

    def __exit__(self, *_: object) -> None:
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
        """Mean over all steps but the first."""
        return (self.seconds - self.first) / max(self._steps - 1, 1)

    @property
    def tokens_per_second(self) -> float:
        """Predicted tokens per second, mean over all steps but the first."""
        seconds = self.seconds - self.first
        return self._tokens / seconds if seconds > 0 else 0.0


class RecompilationCounter:
    """A compiled function that counts compilations after its first call, with a warning.

    Counted by JAX's own events, so that every cause shows: another shape, dtype, sharding or
    option. Counts only while it is entered, and only what its calls compile.
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
                "%s was compiled again, in its call %d: shapes and dtypes should never change",
                *(self._name, self._calls + 1),
            )
        self._calls += 1
        return result

    def _listen(self, event: str, duration_secs: float, **_: str | int) -> None:
        self._compilations += event == self._EVENT
