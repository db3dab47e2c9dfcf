"""Keeps the echoes of a failed save off the terminal: its error is raised, and told once."""

import logging
import sys
from collections.abc import Callable
from typing import Any

from absl import logging as absl_logging


def drop_echoes() -> None:
    """Leave out what is reported of a failed save besides the exception that it raises.

    Orbax logs the error, traceback and all, before it raises it. Then it closes its event loop:
    of every other write that fails, asyncio says that nobody asked for its exception, and every
    write that ends later finds the loop closed, which TensorStore's threads and the coroutines
    report through `sys.unraisablehook`. Together hundreds of lines, up to the end of the process.
    """
    absl_logging.get_absl_logger().addFilter(_is_no_repetition)
    logging.getLogger("asyncio").addFilter(_is_asked_for)
    if not isinstance(sys.unraisablehook, _WithoutClosedLoops):
        sys.unraisablehook = _WithoutClosedLoops(sys.unraisablehook)


def _is_no_repetition(record: logging.LogRecord) -> bool:
    return record.levelno != logging.ERROR or "/orbax/checkpoint/" not in record.pathname


def _is_asked_for(record: logging.LogRecord) -> bool:
    text = record.getMessage()
    return "exception was never retrieved" not in text or "/orbax/checkpoint/" not in text


class _WithoutClosedLoops:
    def __init__(self, hook: Callable[[Any], Any]) -> None:
        self._hook = hook

    def __call__(self, unraisable: Any) -> None:
        is_closed_loop = (
            unraisable.exc_type is RuntimeError
            and str(unraisable.exc_value) == "Event loop is closed"
            and unraisable.object is None
        )
        if not is_closed_loop and not _is_of_orbax(unraisable.object):
            self._hook(unraisable)


def _is_of_orbax(coroutine: Any) -> bool:
    """Whether this is a coroutine of Orbax, which could not end since its loop was closed."""
    code = getattr(coroutine, "cr_code", None)
    return "/orbax/checkpoint/" in getattr(code, "co_filename", "")
