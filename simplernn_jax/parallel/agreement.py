"""What the processes of a run decide together, so that all of them do the same.

With one process, everything here is immediate. A process that waits for another one that has died
waits until `peers` ends it: no time limit here is meant to be reached.
"""

import hashlib
import os
import random
import signal
import time
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from simplernn_jax.errors import UserError

_LONGEST_WAIT_MS = 7 * 24 * 3600 * 1000

_SEEN_SECONDS = 10.0
"""A network file system may take its time to show a new file."""

_VOTE_SECONDS = 1.0
"""Between two votes whether to stop, at least; a step at most comes on top."""

_Result = TypeVar("_Result")


def is_first() -> bool:
    """Whether this is process 0, which alone prints, and writes what is written once."""
    return jax.process_index() == 0


def wait_for_all(name: str) -> None:
    """Returns when every process has come here, in whichever thread.

    Where one may come much later than the others, a computation must not be what waits for it:
    on the CPU it gives up after half an hour.

    Args:
      name: of this point in the program.
    """
    if jax.process_count() > 1:
        everybody = set(range(jax.process_count()))
        # Orbax's, because JAX itself has none in public that is not a computation.
        wait = ocp.multihost.get_barrier_sync_fn(processes=everybody)
        wait(key=f"simplernn_jax/{name}", timeout_ms=_LONGEST_WAIT_MS)


def first_then_others(name: str, function: Callable[[], _Result]) -> _Result:
    """Calls `function` in process 0, then in all others at once: they find what it has left."""
    if not is_first():
        wait_for_all(name)
        return function()
    result = function()
    wait_for_all(name)
    return result


def from_first(number: int) -> int:
    """Process 0's `number`, in every process; int32."""
    wait_for_all("a number of process 0")
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
    mark = os.path.join(folder, f".shared-{from_first(random.getrandbits(31))}")
    if is_first():
        open(mark, "wb").close()
    wait_for_all("a mark is in the folder")
    deadline = time.monotonic() + _SEEN_SECONDS
    while not (seen := os.path.exists(mark)) and time.monotonic() < deadline:
        time.sleep(0.1)
    blind = np.flatnonzero(~np.asarray(multihost_utils.process_allgather(np.bool_(seen))))
    if is_first():
        os.remove(mark)
    if blind.size:
        raise UserError(
            f"{folder}: process {blind[0]} does not see what process 0 writes there; choose a "
            "--workdir on a file system that all hosts share"
        )


class StopVote:
    """Whether a signal has come to any process: asked between steps, about once a second.

    The question is a small computation of its own, so it waits until nothing else is computed: two
    at a time of which each exchanges something would take each other's messages. All processes get
    the same answer at the same step, and with it how many steps later they ask again.

    Args:
      requested: name of the signal that came to this process, or None.
    """

    def __init__(self, requested: Callable[[], str | None]) -> None:
        self._requested = requested
        self._steps_to_go = 0
        self._steps_between = 1
        self._asked_at = time.monotonic()
        if jax.process_count() == 1:
            return
        first_devices = {device.process_index: device for device in reversed(jax.devices())}
        devices = [first_devices[number] for number in range(jax.process_count())]
        mesh = Mesh(np.asarray(devices), ("process",))
        self._apart = NamedSharding(mesh, PartitionSpec("process"))
        together = NamedSharding(mesh, PartitionSpec())
        self._highest = jax.jit(partial(jnp.max, axis=0), out_shardings=together)

    def signal(self, running: Any) -> str | None:
        """Name of the signal that came to any process, if this is a step at which all ask.

        Args:
          running: arrays that are ready only once nothing is computed any more.
        """
        if jax.process_count() == 1:
            return self._requested()
        if self._steps_to_go:
            self._steps_to_go -= 1
            return None
        jax.block_until_ready(running)
        return self.last_signal()

    def last_signal(self) -> str | None:
        """As `signal`, but asks whatever the step; nothing else may be computed."""
        if jax.process_count() == 1:
            return self._requested()
        name, now = self._requested(), time.monotonic()
        seconds_per_step = (now - self._asked_at) / self._steps_between
        microseconds = min(int(1e6 * seconds_per_step), np.iinfo(np.int32).max)
        mine = [[0 if name is None else signal.Signals[name], microseconds]]
        asked = jax.make_array_from_process_local_data(self._apart, np.asarray(mine, np.int32))
        number, slowest = np.asarray(self._highest(asked))
        self._asked_at = now
        self._steps_to_go = int(_VOTE_SECONDS * 1e6 / max(slowest, 1))
        self._steps_between = self._steps_to_go + 1
        return signal.Signals(int(number)).name if number else None
