"""What the processes of a run decide together, so that all of them do the same.

With one process, everything here is immediate. A process that waits for another one that has died
waits until JAX's coordination service ends it: no time limit here is meant to be reached.
"""

import hashlib
import os
import random
import time
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from simplernn_jax.errors import UserError

_LONGEST_WAIT_SECONDS = 7 * 24 * 3600

_SEEN_SECONDS = 10.0
"""A network file system may take its time to show a new file."""

_Result = TypeVar("_Result")


def is_coordinator() -> bool:
    """Whether this is process 0, which alone prints, and writes what is written once."""
    return jax.process_index() == 0


def barrier(name: str, seconds: float = _LONGEST_WAIT_SECONDS) -> None:
    """Returns when every process has come here, in whichever thread.

    Where one may come much later than the others, a computation must not be what waits for it:
    on the CPU it gives up after half an hour.

    Args:
      name: of this point in the program.
      seconds: how long to wait at most.
    """
    if jax.process_count() > 1:
        everybody = set(range(jax.process_count()))
        # Orbax's, because JAX itself has none in public that is not a computation.
        wait = ocp.multihost.get_barrier_sync_fn(processes=everybody)
        wait(key=f"simplernn_jax/{name}", timeout_ms=int(1000 * seconds))


def all_reach(name: str, seconds: float) -> bool:
    """Whether every process comes to this point within some seconds."""
    try:
        barrier(name, seconds)
    except jax.errors.JaxRuntimeError:
        return False
    return True


def coordinator_first(name: str, function: Callable[[], _Result]) -> _Result:
    """Calls `function` in process 0, then in all others at once: they find what it has left.

    Raises:
      UserError: in every process, if `function` raises it in process 0.
    """
    if jax.process_count() == 1:
        return function()
    error: UserError | None = None
    if is_coordinator():
        try:
            result = function()
        except UserError as raised:
            error = raised
    barrier(name)
    if multihost_utils.broadcast_one_to_all(np.bool_(error is not None)):
        raise error or UserError("process 0 has ended with an error: see its output")
    return result if is_coordinator() else function()


def broadcast_from_coordinator(number: int) -> int:
    """Process 0's `number`, in every process; int32."""
    barrier("a number of process 0")
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def check_same(what: str, text: str) -> None:
    """Checks that `text` is the same in every process.

    Args:
      what: what a process has whose text is another one, and what to do then.
      text: anything.

    Raises:
      UserError: in every process, the same; names the first process that differs from process 0.
    """
    if jax.process_count() == 1:
        return
    digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.int32)
    digests = np.asarray(multihost_utils.process_allgather(digest))
    differing = np.flatnonzero((digests != digests[:1]).any(axis=1))
    if differing.size:
        raise UserError(f"process {differing[0]} has {what}")


def check_shared(folder: str) -> None:
    """Checks that every process sees what process 0 writes into `folder`.

    Raises:
      UserError: in every process, the same; names the first process that does not.
    """
    if jax.process_count() == 1:
        return
    mark = os.path.join(folder, f".shared-{broadcast_from_coordinator(random.getrandbits(31))}")
    if is_coordinator():
        open(mark, "wb").close()
    barrier("a mark is in the folder")
    deadline = time.monotonic() + _SEEN_SECONDS
    while not (seen := os.path.exists(mark)) and time.monotonic() < deadline:
        time.sleep(0.1)
    barrier("all have looked")
    if is_coordinator():
        os.remove(mark)
    where = "on a file system that all hosts share"
    check_same(f"not process 0's {folder}: choose a --workdir {where}", str(seen))


class PreemptionSync:
    """Whether a signal to any process ends the run: all get the same answer at the same step.

    JAX's preemption service tells SIGTERM to all and agrees on the step. It handles the signal
    itself from `jax.distributed.initialize` on.

    Args:
      requested: name of the signal that came to this process, or None; asked where it is the only
        one.
    """

    def __init__(self, requested: Callable[[], str | None]) -> None:
        self._requested = requested

    def signal(self, step: int) -> str | None:
        """Name of the signal that ends the run at `step`; to be asked before every step."""
        if jax.process_count() == 1:
            return self._requested()
        return "SIGTERM" if multihost_utils.reached_preemption_sync_point(step) else None
