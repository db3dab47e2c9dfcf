"""What a run prints: a bar on a terminal, plain lines elsewhere; and how long its steps take."""

import contextlib
import statistics
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from simplernn_jax.parallel.distributed import is_coordinator

if TYPE_CHECKING:
    from rich.progress import Progress

SECONDS_BETWEEN_LINES = 5.0


class Display:
    """Lines and progress of a run on the standard output of the coordinator.

    `progress` is a bar, which replaces the line of progress every 5 seconds.
    """

    def __init__(self, total_steps: int, progress: "Progress | None" = None) -> None:
        self._total = total_steps
        self._progress = progress
        self._last_line = -SECONDS_BETWEEN_LINES
        self._losses: list[float] = []
        """Losses of the steps since the last line, which shows their mean."""

    def update(self, step: int, loss: float, tokens_per_second: float, seconds_left: float) -> None:
        """Show progress; 0 tokens per second if the speed is not known yet."""
        speed = ""
        if tokens_per_second:
            speed = f"  {tokens_per_second:,.0f} tokens/s  {format_duration(seconds_left)} left"
        if self._progress is not None:
            (task,) = self._progress.task_ids
            self._progress.update(task, completed=step, status=f"loss {loss:.4f}{speed}")
            return
        self._losses.append(loss)
        now = time.monotonic()
        if now - self._last_line >= SECONDS_BETWEEN_LINES:
            mean = statistics.fmean(self._losses)
            self.print_line(f"step {step}/{self._total}  loss {mean:.4f}{speed}")
            self._last_line, self._losses = now, []

    def print_line(self, text: str) -> None:
        """Print a line above the bar."""
        if self._progress is not None:
            self._progress.console.print(text, markup=False, highlight=False)
        elif is_coordinator():
            print(text, flush=True)


@contextlib.contextmanager
def open_display(first_step: int, total_steps: int) -> Iterator[Display]:
    """Open the display, with a bar if stdout is a terminal that can draw it."""
    console = None
    if is_coordinator() and sys.stdout.isatty():
        from rich.console import Console

        console = Console()
    if console is None or console.is_dumb_terminal:
        yield Display(total_steps)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[status]}"))
    with Progress(TextColumn("step"), *columns, console=console) as progress:
        progress.add_task("", total=total_steps, completed=first_step, status="")
        yield Display(total_steps, progress)


def format_duration(seconds: float) -> str:
    """Return ``1:05`` or ``2:03:04``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class StepTimer:
    """Training time without evaluations, samples and saves; speed without the first step."""

    def __init__(self, seconds_before: float = 0.0) -> None:
        """Start now at 0; `seconds_before` is the training time before the run was resumed."""
        self.seconds = 0.0
        self.first = 0.0
        """Seconds of the first step, compilation included."""
        self._before = seconds_before
        self._steps = 0
        self._tokens = 0
        self._since = time.monotonic()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time of the ``with`` block."""
        before = time.monotonic()
        yield
        self._since += time.monotonic() - before

    def tick(self, tokens: int) -> None:
        """Count a finished step."""
        now = time.monotonic()
        self.seconds, self._since = self.seconds + now - self._since, now
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


def align(values: dict[str, str]) -> str:
    """Return aligned lines ``name  value``."""
    width = max(map(len, values))
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in values.items())
