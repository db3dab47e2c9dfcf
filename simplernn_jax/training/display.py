"""Progress of a run on the terminal: a bar where one can be drawn, plain lines elsewhere."""

import codecs
import io
import os
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from simplernn_jax.parallel.distributed import is_coordinator

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

SECONDS_BETWEEN_LINES = 5.0


class Display:
    """Base class, and the null display of processes that are not the coordinator."""

    def update(self, step: int, loss: float, tokens_per_second: float, seconds_left: float) -> None:
        """Show progress; 0 tokens per second if the speed is not known yet."""

    def print_line(self, text: str) -> None:
        """Print a line above the progress bar."""


@contextmanager
def open_display(first_step: int, total_steps: int) -> Iterator[Display]:
    """Show a progress bar if stdout is a terminal that supports it, else a line every 5 seconds."""
    if not is_coordinator():
        yield Display()
        return
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(
            errors="replace"
        )  # samples may hold characters that the terminal cannot show
    if not _can_draw(sys.stdout):
        yield _Lines(total_steps)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn(
            "loss {task.fields[loss]}  {task.fields[rate]} tokens/s  {task.fields[left]} left"
        ),
    )
    with Progress(*columns) as progress:
        task = progress.add_task(
            "", total=total_steps, completed=first_step, loss="-", rate="-", left="-"
        )
        yield _Bar(progress, task)


def format_duration(seconds: float) -> str:
    """Return ``1:05`` or ``2:03:04``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _can_draw(stream: TextIO) -> bool:
    """Return whether `stream` is a terminal that supports cursor movement and UTF-8."""
    if not stream.isatty() or os.environ.get("TERM", "dumb") in ("", "dumb", "unknown"):
        return False
    try:
        return codecs.lookup(stream.encoding or "ascii").name == "utf-8"
    except LookupError:
        return False


class _Bar(Display):
    def __init__(self, progress: "Progress", task: "TaskID") -> None:
        self._progress = progress
        self._task = task

    def update(self, step: int, loss: float, tokens_per_second: float, seconds_left: float) -> None:
        self._progress.update(
            self._task,
            completed=step,
            loss=f"{loss:.4f}",
            rate=f"{tokens_per_second:,.0f}" if tokens_per_second else "-",
            left=format_duration(seconds_left) if tokens_per_second else "-",
        )

    def print_line(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False)


class _Lines(Display):
    def __init__(self, total_steps: int) -> None:
        self._total = total_steps
        self._last = -SECONDS_BETWEEN_LINES
        self._losses: list[float] = []
        """Losses of the steps since the last line, which shows their mean."""

    def update(self, step: int, loss: float, tokens_per_second: float, seconds_left: float) -> None:
        self._losses.append(loss)
        now = time.monotonic()
        if now - self._last < SECONDS_BETWEEN_LINES:
            return
        self._last = now
        line = f"step {step}/{self._total}  loss {statistics.fmean(self._losses):.4f}"
        self._losses = []
        if tokens_per_second:
            line += f"  {tokens_per_second:,.0f} tokens/s  {format_duration(seconds_left)} left"
        self.print_line(line)

    def print_line(self, text: str) -> None:
        print(text, flush=True)
