"""Progress of reading a corpus: a bar on a terminal, lines elsewhere."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from absl import logging

from simplernn_jax.errors import format_bytes

_SECONDS_PER_LINE = 30


@contextlib.contextmanager
def reading_progress(task: str, total_bytes: int, *, show: bool) -> Iterator[Callable[[int], None]]:
    """Yield a function to call with the bytes read so far."""
    if not show:
        yield lambda bytes_read: None
    elif sys.stderr.isatty():
        yield from _bar(task, total_bytes)
    else:
        yield from _lines(task, total_bytes)


def _lines(task: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    start = latest = time.monotonic()
    logging.info("%s: %s ...", task, format_bytes(total_bytes))

    def update(bytes_read: int) -> None:
        nonlocal latest
        now = time.monotonic()
        if now - latest >= _SECONDS_PER_LINE:
            latest = now
            done = bytes_read / max(total_bytes, 1)
            left = (now - start) * (1 - done) / max(done, 1e-9)
            logging.info("%s: %.0f %%, %.0f s left", task, 100 * done, left)

    yield update
    logging.info("%s: done in %.1f s", task, time.monotonic() - start)


def _bar(task: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    from rich import markup, progress
    from rich.console import Console

    with progress.Progress(console=Console(stderr=True)) as bar:
        handle = bar.add_task(markup.escape(task[-32:]), total=total_bytes)
        shown = 0

        def update(bytes_read: int) -> None:
            nonlocal shown
            # An update costs more than a small document.
            if bytes_read - shown > total_bytes // 1000:
                shown = bytes_read
                bar.update(handle, completed=bytes_read)

        yield update
        bar.update(handle, completed=total_bytes)
