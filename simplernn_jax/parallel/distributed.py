"""A run of several processes, on `jax.distributed`; with one process everything returns at once.

JAX's coordination service aborts a process whose peer died, was suspended or unreachable (see
`supervisor`). Anyone who reaches its port can end the run: restrict it to the run's hosts.
"""

import contextlib
import errno
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from simplernn_jax import __version__
from simplernn_jax.devices import check_devices
from simplernn_jax.errors import EXIT_PEER_FAILURE, EXIT_USER_ERROR, UserError
from simplernn_jax.files import sha256_hex
from simplernn_jax.parallel import supervisor


@contextlib.contextmanager
def joined(
    coordinator: str | None, num_processes: int | None, process_id: int | None, timeout: int
) -> Iterator[None]:
    """Join the run: inside, ``jax.devices()`` lists the devices of all processes.

    The arguments go to `jax.distributed.initialize`, the first three None where JAX detects
    the cluster, `timeout` in seconds. After an exception, end this process by `os._exit`.

    Raises:
      UserError: an argument is missing or wrong, or the processes differ in it.
    """
    supervisor.set_abort_reason(
        EXIT_USER_ERROR,
        f"not all processes have joined {coordinator or 'the run'} within {timeout} s: check that "
        "all run, with the same --coordinator and --num_processes and a different --process_id, "
        "and that all can reach that address",
    )
    is_detected = {coordinator, num_processes, process_id} == {None}
    try:
        # Gloo prints lines in C++ for every connection of every device.
        _discard_output_of_libraries()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # Python's handlers run when all have joined
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            cluster_detection_method=None if is_detected else "deactivate",
            coordinator_bind_address=coordinator and _bind_address(coordinator, process_id),
            initialization_timeout=timeout,
            heartbeat_timeout_seconds=supervisor.HEARTBEAT_SECONDS,
        )
    except (RuntimeError, OSError, KeyError, ValueError) as error:
        raise UserError(
            f"--distributed: {error} Pass --coordinator HOST:PORT, --num_processes N and "
            "--process_id I, or none of them if SLURM, Open MPI before version 5, or Kubernetes "
            "with jax[k8s] starts all"
        ) from error
    supervisor.set_abort_reason(
        EXIT_PEER_FAILURE,
        "a peer process failed (died, was suspended, or became unreachable): restart all with the "
        "same commands, and the run resumes from its last checkpoint",
    )
    versions = f"simplernn_jax {__version__}, jax {jax.__version__}, {num_processes} processes"
    try:
        check_devices()
        check_same(versions, f"has different settings from process 0 ({versions}); use the same")
        yield
        barrier("shutdown")
        jax.distributed.shutdown()
    except UserError:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # the error of this process alone
            barrier("error", seconds=5)
            jax.distributed.shutdown()
            if not is_coordinator():  # which prints the line
                sys.exit(EXIT_USER_ERROR)
        raise
    except Exception as error:
        if "Gloo" in str(error):  # a connection to another process was closed
            os._exit(EXIT_PEER_FAILURE)
        if isinstance(error, jax.errors.JaxRuntimeError):  # if a peer failed, the abort comes
            time.sleep(supervisor.HEARTBEAT_SECONDS + 5)
        raise


def _discard_output_of_libraries() -> None:
    """Keep stdout for Python: what libraries print in C or C++ is discarded from now on."""
    sys.stdout.flush()
    sys.stdout = os.fdopen(os.dup(1), "w", -1, sys.stdout.encoding, sys.stdout.errors)
    with open(os.devnull, "wb") as null:
        os.dup2(null.fileno(), 1)


def _bind_address(coordinator: str, process_id: int | None) -> str | None:
    """Return the address for process 0 to listen at; None is JAX's default, every address."""
    host, _, port = coordinator.rpartition(":")
    if not (host and port.isdecimal() and 0 < int(port[:6]) < 2**16):
        raise UserError(f"--coordinator={coordinator}: not HOST:PORT, such as node1:12345")
    if process_id != 0 or "JAX_COORDINATOR_BIND_ADDRESS" in os.environ:
        return None
    host = host.strip("[]")
    try:
        family, *_, found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        socket.create_server(found[:2], family=family).close()
    except OSError as error:
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            raise
        return None
    # /etc/hosts may give a machine's own name a loopback address.
    is_own_name = str(found[0]).startswith(("127.", "::1")) and host not in ("localhost", found[0])
    return None if is_own_name else coordinator


def is_coordinator() -> bool:
    """Return whether this is process 0, which alone prints, and writes what is written once."""
    return jax.process_index() == 0


def barrier(name: str, seconds: float = 1e6) -> None:
    """Wait until every process reaches the barrier of this name, in any thread."""
    # That of `multihost_utils` is a computation, which interleaves with training and may time out.
    ocp.multihost.get_barrier_sync_fn()(key=f"simplernn_jax/{name}", timeout_ms=int(1000 * seconds))


def run_on_coordinator_first(function: Callable[[], Any]) -> Any:
    """Call `function` in process 0, then in all others; its UserError there is raised in all."""
    error: UserError | None = None
    if is_coordinator():
        try:
            result = function()
        except UserError as raised:
            error = raised
    if broadcast_from_coordinator(error is not None):
        raise error or UserError("process 0 ended with an error: see its output")
    return result if is_coordinator() else function()


def broadcast_from_coordinator(number: int) -> int:
    """Return process 0's `number`, an int32, in every process."""
    barrier("broadcast")
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def check_same(text: str, difference: str) -> None:
    """Raise UserError, ``a process DIFFERENCE``, unless `text` is the same in every process."""
    barrier("check_same")  # the computation below would time out while a process still works
    try:
        multihost_utils.assert_equal(np.frombuffer(bytes.fromhex(sha256_hex(text)), np.int32))
    except AssertionError:
        raise UserError(f"a process {difference}") from None
