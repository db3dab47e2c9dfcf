"""Orbax's writer of checkpoint folders, without the noise that it makes about a failed save."""

import logging
import sys
from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging as absl_logging

_PEERS_SECONDS = 24 * 3600
"""Limit on waiting for other processes; a failed one ends all of them long before."""

_ALONE_SECONDS = 100 * 365 * 24 * 3600
"""One process waits for nobody, and Orbax measures by a clock that may be set meanwhile."""


def make_writer() -> ocp.AsyncCheckpointer:
    """Return Orbax's writer of checkpoint folders.

    By default the processes of a run wait for each other in computations on the devices, which get
    in the way of training when they come from another thread.
    """
    drop_noise()
    handler = ocp.CompositeCheckpointHandler()
    if jax.process_count() == 1:
        options = ocp.options.AsyncOptions(timeout_secs=_ALONE_SECONDS)
        return ocp.AsyncCheckpointer(handler, async_options=options)
    everybody = set(range(jax.process_count()))
    return ocp.AsyncCheckpointer(
        handler,
        async_options=ocp.options.AsyncOptions(
            timeout_secs=_PEERS_SECONDS, barrier_sync_fn=_wait_unless_failing
        ),
        multiprocessing_options=ocp.options.MultiprocessingOptions(active_processes=everybody),
    )


def _wait_unless_failing(*, key: str, timeout_ms: int) -> None:
    """Wait for all processes, but not while handling an error: the others wait elsewhere then."""
    error = sys.exception()
    if error is not None:
        raise error
    ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)


def drop_noise() -> None:
    """Drop all reports of a failed save but the exception that it raises.

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
