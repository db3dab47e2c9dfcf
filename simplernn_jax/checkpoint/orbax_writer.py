"""Orbax's writer of checkpoint folders, without its repeated logs about a failed save."""

import logging
import sys
from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging as absl_logging

_PEER_TIMEOUT_SECONDS = 24 * 3600
"""Limit on waiting for other processes; a failed one ends all of them long before."""

_SINGLE_PROCESS_TIMEOUT_SECONDS = 100 * 365 * 24 * 3600
"""One process waits for no peer, and Orbax measures by a clock that may be set meanwhile."""


_WRITERS = ("/orbax/checkpoint/", "OCDBT database", "os_error_code=")
"""Parts of what asyncio logs about a task of Orbax, or about a future of TensorStore."""


def make_writer() -> ocp.AsyncCheckpointer:
    """Return Orbax's writer of checkpoint folders.

    By default the processes of a run wait for each other in computations on the devices, which
    interfere with training when another thread starts them.
    """
    drop_repeated_logs()
    if jax.process_count() == 1:
        # Created in the background, a folder that the disk refuses leaves threads that wait for it
        # up to the timeout, and the process does not end.
        options = ocp.options.AsyncOptions(
            timeout_secs=_SINGLE_PROCESS_TIMEOUT_SECONDS, create_directories_asynchronously=False
        )
        items = ocp.CompositeOptions(async_options=options)
        handler = ocp.CompositeCheckpointHandler(composite_options=items)
        return ocp.AsyncCheckpointer(handler, async_options=options)
    handler = ocp.CompositeCheckpointHandler()
    everybody = set(range(jax.process_count()))
    return ocp.AsyncCheckpointer(
        handler,
        async_options=ocp.options.AsyncOptions(
            timeout_secs=_PEER_TIMEOUT_SECONDS, barrier_sync_fn=_wait_unless_failing
        ),
        multiprocessing_options=ocp.options.MultiprocessingOptions(active_processes=everybody),
    )


def _wait_unless_failing(*, key: str, timeout_ms: int) -> None:
    """Wait for all processes, but not while handling an error: the others wait elsewhere then."""
    error = sys.exception()
    if error is not None:
        raise error
    ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)


def drop_repeated_logs() -> None:
    """Drop all reports of a failed save but the exception that it raises.

    Orbax logs the error and its traceback before it raises it. Then it closes its event loop: for
    every other failed write, asyncio logs an exception that was never retrieved, and every later
    write finds the loop closed, which TensorStore's threads and the coroutines report through
    `sys.unraisablehook`: hundreds of lines, up to the end of the process.
    """
    absl_logging.get_absl_logger().addFilter(_is_not_repeated)
    logging.getLogger("asyncio").addFilter(_is_not_orphaned)
    if not isinstance(sys.unraisablehook, _WithoutClosedLoops):
        sys.unraisablehook = _WithoutClosedLoops(sys.unraisablehook)


def _is_not_repeated(record: logging.LogRecord) -> bool:
    return record.levelno != logging.ERROR or "/orbax/checkpoint/" not in record.pathname


def _is_not_orphaned(record: logging.LogRecord) -> bool:
    if "exception was never retrieved" not in record.getMessage():
        return True
    text = logging.Formatter().format(record)  # with the traceback
    return not any(part in text for part in _WRITERS)


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
    """Return whether Orbax made this coroutine, which cannot end because its loop was closed."""
    code = getattr(coroutine, "cr_code", None)
    return "/orbax/checkpoint/" in getattr(code, "co_filename", "")
