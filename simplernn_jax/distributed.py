"""A run of several processes, on `jax.distributed`: joining, leaving, agreeing.

With one process everything here is immediate. JAX's coordination service ends a process whose
peer died or hangs (`supervisor`): no time limit of a barrier is meant to be reached.

Whoever reaches the coordinator's port can join or end the run. On a loopback address only this
machine can; otherwise let only the hosts of the run reach it.
"""

import contextlib
import errno
import os
import random
import socket
import sys
import time
from collections.abc import Callable, Iterator
from typing import NoReturn, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from simplernn_jax import __version__, supervisor
from simplernn_jax.errors import EXIT_PEER_LOST, EXIT_USER_ERROR, UserError
from simplernn_jax.files import sha256_hex

_WEEK_SECONDS = 7 * 24 * 3600
_SHARED_SECONDS = 10.0
"""Time that a network file system may take to show a new file."""

_Result = TypeVar("_Result")


@contextlib.contextmanager
def joined(
    coordinator: str | None, num_processes: int | None, process_id: int | None, timeout: int
) -> Iterator[None]:
    """Join the run: inside, ``jax.devices()`` are those of all processes.

    Args:
      coordinator: ``HOST:PORT`` of process 0, which listens there alone if its machine has that
        address (JAX_COORDINATOR_BIND_ADDRESS sets another); None, as the next two, where SLURM,
        Kubernetes (with its Python package) or Open MPI started this process.
      num_processes: number of processes.
      process_id: number of this one, from 0.
      timeout: seconds within which all must have joined.

    Raises:
      UserError: an argument is missing or wrong, or the processes differ in it.
    """
    supervisor.set_failure(
        EXIT_USER_ERROR,
        f"not all processes have joined {coordinator or 'the run'} within {timeout} s: see that "
        "all run, with the same --coordinator and --num_processes and each with its own "
        "--process_id, and that all can reach that address",
    )
    _initialize(coordinator, num_processes, process_id, timeout)
    supervisor.set_failure(
        EXIT_PEER_LOST,
        "another process of the run was lost (died, hangs or cannot be reached): start all again "
        "with the same commands, and the run resumes from its last checkpoint",
    )
    try:
        versions = f"simplernn_jax {__version__}, jax {jax.__version__}, {num_processes} processes"
        check_same(versions, f"other settings than process 0 ({versions}): start all with the same")
        yield
        barrier("the end")
        jax.distributed.shutdown()
    except UserError:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # the error of this process alone
            barrier("an error", seconds=5)
            is_printed_elsewhere = not is_coordinator()
            jax.distributed.shutdown()
            if is_printed_elsewhere:
                sys.exit(EXIT_USER_ERROR)
        raise
    except Exception as error:
        if "Gloo" in str(error):  # a connection to another process was closed
            os._exit(EXIT_PEER_LOST)
        if isinstance(error, jax.errors.JaxRuntimeError):  # if a peer was lost, the abort comes
            time.sleep(supervisor.HEARTBEAT_SECONDS + 5)
        raise


def leave(code: int) -> NoReturn:
    """Exit, without JAX's wait for the other processes if they have not left."""
    if not jax.distributed.is_initialized():
        sys.exit(code)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _initialize(
    coordinator: str | None, num_processes: int | None, process_id: int | None, timeout: int
) -> None:
    bind_address = None
    if coordinator is not None:
        host, _, port = coordinator.rpartition(":")
        if not (host and port.isdecimal() and 0 < int(port[:6]) < 2**16):
            raise UserError(f"--coordinator={coordinator}: not HOST:PORT, such as node1:12345")
        if process_id == 0 and "JAX_COORDINATOR_BIND_ADDRESS" not in os.environ:
            bind_address = coordinator if _can_listen(host.strip("[]"), int(port)) else None
    is_explicit = (coordinator, num_processes, process_id) != (None, None, None)
    _keep_stdout_for_python()
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            cluster_detection_method="deactivate" if is_explicit else None,
            coordinator_bind_address=bind_address,
            initialization_timeout=timeout,
            heartbeat_timeout_seconds=supervisor.HEARTBEAT_SECONDS,
        )
    except (RuntimeError, OSError, KeyError, ValueError) as error:
        raise UserError(
            f"--distributed: {error} Give --coordinator HOST:PORT, --num_processes N and "
            "--process_id I, or none of them where SLURM, Kubernetes or Open MPI starts all"
        ) from error


def _can_listen(host: str, port: int) -> bool:
    """Whether process 0 can listen at `host` alone; it listens at every address if not."""
    try:
        family, *_, found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        address = str(found[0])
        if address.startswith(("127.", "::1")) and host not in ("localhost", address):
            return False  # /etc/hosts may give a machine's own name a loopback address
        socket.create_server((address, port), family=family).close()
    except OSError as error:
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            raise UserError(
                f"process 0 cannot listen at {host}:{port} ({os.strerror(error.errno)}): choose "
                "another port for all processes"
            ) from error
        return False
    return True


def _keep_stdout_for_python() -> None:
    """Discard Gloo's lines, which it prints in C++ for every connection of every device."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
    buffering = 1 if os.isatty(kept) else -1
    sys.stdout = os.fdopen(kept, "w", buffering, sys.stdout.encoding, sys.stdout.errors)


def is_coordinator() -> bool:
    """Whether this is process 0, which alone prints, and writes what is written once."""
    return jax.process_index() == 0


def barrier(name: str, seconds: float = _WEEK_SECONDS) -> None:
    """Wait until every process reaches the barrier of this name, in whichever thread."""
    # Orbax's: that of `multihost_utils` is a computation, which on the CPU gives up after half an
    # hour and would interleave with those of training.
    ocp.multihost.get_barrier_sync_fn()(key=f"simplernn_jax/{name}", timeout_ms=int(1000 * seconds))


def run_on_coordinator_first(function: Callable[[], _Result]) -> _Result:
    """Call `function` in process 0, then in all others at once, which find what it has written.

    Raises:
      UserError: in every process, if `function` raises it in process 0.
    """
    error: UserError | None = None
    if is_coordinator():
        try:
            result = function()
        except UserError as raised:
            error = raised
    if broadcast_from_coordinator(error is not None):
        raise error or UserError("process 0 has ended with an error: see its output")
    return result if is_coordinator() else function()


def broadcast_from_coordinator(number: int) -> int:
    """Return process 0's `number`, an int32, in every process."""
    barrier("a broadcast")
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def check_same(text: str, difference: str) -> None:
    """Check that `text` is the same in every process.

    Raises:
      UserError: in every process: ``a process has DIFFERENCE``.
    """
    try:
        multihost_utils.assert_equal(np.frombuffer(bytes.fromhex(sha256_hex(text)), np.int32))
    except AssertionError:
        raise UserError(f"a process has {difference}") from None


def check_shared(folder: str) -> None:
    """Check that every process sees what process 0 writes into `folder`.

    Raises:
      UserError: in every process, if one of them does not.
    """
    if jax.process_count() == 1:
        return
    mark = os.path.join(folder, f".shared-{broadcast_from_coordinator(random.getrandbits(31))}")
    if is_coordinator():
        open(mark, "wb").close()
    barrier("a mark is in the folder")
    deadline = time.monotonic() + _SHARED_SECONDS
    while not (is_seen := os.path.exists(mark)) and time.monotonic() < deadline:
        time.sleep(0.1)
    barrier("all have looked")
    if is_coordinator():
        os.remove(mark)
    advice = "choose a --workdir on a file system that all hosts share"
    check_same(str(is_seen), f"not process 0's {folder}: {advice}")


class PreemptionSync:
    """Agreement of all processes on the step at which a signal to any of them ends the run.

    JAX's preemption service handles SIGTERM from `jax.distributed.initialize` on; where there is
    one process alone, `requested` gives the name of the signal that came, or None.
    """

    def __init__(self, requested: Callable[[], str | None]) -> None:
        self._requested = requested

    def signal(self, step: int) -> str | None:
        """Return the name of the signal that ends the run at `step`; ask before every step."""
        if jax.process_count() == 1:
            return self._requested()
        return "SIGTERM" if multihost_utils.reached_preemption_sync_point(step) else None
