"""How long training takes, and how fast it goes."""

import time


class Clock:
    """Training time without evaluations, samples and saves; speed without the first step."""

    def __init__(self, seconds_before: float = 0.0) -> None:
        """Begin at 0; `seconds_before` were trained before the run was resumed."""
        self.seconds = 0.0
        self._before = seconds_before
        self.first = 0.0
        """Seconds of the first step, compilation included."""
        self._steps = 0
        self._tokens = 0
        self._since: float | None = None

    def start(self) -> None:
        """Goes on counting."""
        self._since = time.monotonic()

    def stop(self) -> None:
        """Stops counting."""
        if self._since is not None:
            self.seconds += time.monotonic() - self._since
            self._since = None

    def paused(self) -> "Clock":
        """Stops the clock inside a ``with`` block."""
        return self

    def __enter__(self) -> None:
        self.stop()

    def __exit__(self, *_: object) -> None:
        self.start()

    def tick(self, tokens: int) -> None:
        """A step has ended."""
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
        steps = max(self._steps - 1, 1)
        return (self.seconds - self.first) / steps

    @property
    def tokens_per_second(self) -> float:
        """Predicted tokens per second, mean over all steps but the first."""
        seconds = self.seconds - self.first
        return self._tokens / seconds if seconds > 0 else 0.0
