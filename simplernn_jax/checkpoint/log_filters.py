"""Filters for what Orbax and asyncio log about a failed save besides its exception."""

import logging
import sys
from collections.abc import Callable
from typing import Any

from absl import logging as absl_logging

_ORBAX = "/orbax/checkpoint/"


def filter_save_errors() -> None:
    """Drop what is logged about a failed save besides the exception that it raises.

    Orbax logs the error with its traceback before it raises it, then closes its event loop. For
    every other failing write asyncio logs an exception that was never retrieved, and every write
    that ends later finds the loop closed, which TensorStore's threads and the coroutines report
    through `sys.unraisablehook`. Together hundreds of lines, up to the end of the process.
    """
    absl_logging.get_absl_logger().addFilter(_is_no_orbax_error)
    logging.getLogger("asyncio").addFilter(_is_retrieved)
    if not isinstance(sys.unraisablehook, _UnraisableHook):
        sys.unraisablehook = _UnraisableHook(sys.unraisablehook)


def _is_no_orbax_error(record: logging.LogRecord) -> bool:
    return record.levelno != logging.ERROR or _ORBAX not in record.pathname


def _is_retrieved(record: logging.LogRecord) -> bool:
    text = record.getMessage()
    return "exception was never retrieved" not in text or _ORBAX not in text


class _UnraisableHook:
    """A hook that drops closed event loops and Orbax's unfinished coroutines."""

    def __init__(self, hook: Callable[[Any], Any]) -> None:
        self._hook = hook

    def __call__(self, unraisable: Any) -> None:
        is_closed_loop = (
            unraisable.exc_type is RuntimeError
            and str(unraisable.exc_value) == "Event loop is closed"
            and unraisable.object is None
        )
        code = getattr(unraisable.object, "cr_code", None)
        if not is_closed_loop and _ORBAX not in getattr(code, "co_filename", ""):
            self._hook(unraisable)
