"""What a person sees while a run trains: a bar on a terminal, plain lines elsewhere."""

import codecs
import io
import os
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, TextIO

from simplernn_jax.distributed import is_coordinator

SECONDS_BETWEEN_LINES = 5.0


class Display(Protocol):
    """Shows the progress of a run."""

    def update(self, step: int, loss: float, tokens_per_second: float, seconds_left: float) -> None:
        """Shows where the run is; 0 tokens per second says that the speed is not known yet."""

    def say(self, text: str) -> None:
        """Prints a line that stays."""


@contextmanager
def open_display(first_step: int, total_steps: int) -> Iterator[Display]:
    """Show a rich progress bar if stdout is a terminal that can draw one, otherwise lines at most
    every 5 seconds."""
    if not is_coordinator():
        yield NoDisplay()
        return
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a sample may hold what the terminal cannot show
    if not _can_draw(sys.stdout):
        yield _PlainLines(total_steps)
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


def _can_draw(stream: TextIO) -> bool:
    """Whether `stream` is a terminal that moves its cursor and shows more than ASCII."""
    if not stream.isatty() or os.environ.get("TERM", "dumb") in ("", "dumb", "unknown"):
        return False
    try:
        return codecs.lookup(stream.encoding or "ascii").name == "utf-8"
    except LookupError:
        return False


class NoDisplay:
    """Shows nothing: of several processes, only process 0 speaks."""

    def update(self, step: int, loss: float, tokens_per_second: float, seconds_left: float) -> None:
        """Does nothing."""

    def say(self, text: str) -> None:
        """Does nothing."""


class _Bar:
    def __init__(self, progress, task):  # type: ignore[no-untyped-def]
        self._progress = progress
        self._task = task

    def update(self, step: int, loss: float, tokens_per_second: float, seconds_left: float) -> None:
        self._progress.update(
            self._task,
            completed=step,
            loss=f"{loss:.4f}",
            rate=f"{tokens_per_second:,.0f}" if tokens_per_second else "-",
            left=clock(seconds_left) if tokens_per_second else "-",
        )

    def say(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False)


class _PlainLines:
    def __init__(self, total_steps: int):
        self._total = total_steps
        self._last = -SECONDS_BETWEEN_LINES
        self._losses: list[float] = []
        """Of the steps since the last line, which shows their mean."""

    def update(self, step: int, loss: float, tokens_per_second: float, seconds_left: float) -> None:
        self._losses.append(loss)
        now = time.monotonic()
        if now - self._last < SECONDS_BETWEEN_LINES:
            return
        self._last = now
        line = f"step {step}/{self._total}  loss {statistics.fmean(self._losses):.4f}"
        self._losses = []
        if tokens_per_second:
            line += f"  {tokens_per_second:,.0f} tokens/s  {clock(seconds_left)} left"
        self.say(line)

    def say(self, text: str) -> None:
        print(text, flush=True)


def clock(seconds: float) -> str:
    """``1:05`` or ``2:03:04``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
