"""How Orbax's processes wait for each other while they write a checkpoint together."""

import sys
from typing import Any

import jax
import orbax.checkpoint as ocp

_PATIENCE_SECONDS = 24 * 3600
"""A process that has died ends the others long before (`distributed.HEARTBEAT_SECONDS`)."""

_ALONE_SECONDS = 100 * 365 * 24 * 3600
"""One process waits for nobody, and Orbax measures by a clock that may be set meanwhile."""


def among_processes() -> dict[str, Any]:
    """Options of `ocp.CheckpointManager`.

    By default several processes wait in computations on the devices, which get in the way of
    training when they come from another thread.
    """
    if jax.process_count() == 1:
        return {"async_options": ocp.options.AsyncOptions(timeout_secs=_ALONE_SECONDS)}
    together = ocp.options.MultiprocessingOptions(active_processes=set(range(jax.process_count())))
    return {
        "multiprocessing_options": together,
        "async_options": ocp.options.AsyncOptions(
            timeout_secs=_PATIENCE_SECONDS, barrier_sync_fn=_wait_unless_failing
        ),
    }


def _wait_unless_failing(*, key: str, timeout_ms: int) -> None:
    """Waits for all, but not on the way out of an error: the others wait elsewhere then."""
    error = sys.exception()
    if error is not None:
        raise error
    everybody = set(range(jax.process_count()))
    ocp.multihost.get_barrier_sync_fn(processes=everybody)(key=key, timeout_ms=timeout_ms)
