"""Joining and leaving a run of several processes, on `jax.distributed`.

Its coordination service notices by heartbeats that a process died or hangs, and then aborts all
others from within C++. So that this ends in one line and an exit code of its own, each process
trains in a child of itself (`supervise`).

Whoever reaches the coordinator's port can join or end the run. On a loopback address only this
machine can; otherwise let only the hosts of the run reach it.
"""

import contextlib
import ctypes
import errno
import ipaddress
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

from simplernn_jax.errors import UserError, one_line

EXIT_PEER_LOST = 76
"""Another process of the run died or hangs (EX_PROTOCOL); the same commands resume."""

HEARTBEAT_SECONDS = 20
"""A process that sends no heartbeat for so long is lost."""

_EXIT_USER_ERROR = 2
_LOST = (
    "another process of the run was lost (died, hangs or cannot be reached): start all again with "
    "the same commands, and the run resumes from its last checkpoint"
)
_notes = -1
"""File descriptor at which the child of `supervise` leaves what an abort would mean."""


def supervise() -> None:
    """Go on in a child process; this one waits for it and exits with its code.

    The first SIGTERM or SIGINT is passed on as SIGTERM, a second one kills the child. Call it
    before anything imports jax, which does not survive a fork.
    """
    global _notes
    parent, signals = os.getpid(), (signal.SIGTERM, signal.SIGINT)
    notes, _notes = os.pipe()
    sys.stdout.flush()
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    child = os.fork()
    if child == 0:
        end_with_parent(parent)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
        return
    to_send = [signal.SIGKILL, signal.SIGTERM]

    def pass_on(number: int, frame: FrameType | None) -> None:
        os.kill(child, to_send.pop() if len(to_send) > 1 else to_send[0])

    for number in signals:
        signal.signal(number, pass_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.write(_notes, b"\n")  # so that reading does not wait
    noted = os.read(notes, 65536).decode().split("\n")[:-2]
    if noted and code in (-signal.SIGABRT, EXIT_PEER_LOST):
        number_text, line = noted[-1].split(" ", 1)
        code = int(number_text)
        print(f"error: {line}", file=sys.stderr, flush=True)
    os._exit(code if code >= 0 else 128 - code)


def end_with_parent(parent: int) -> None:
    """Have Linux kill this process when its parent, of process id `parent`, has died."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(128 + signal.SIGKILL)


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
      UserError: what was given is incomplete or wrong, or the processes differ in it.
    """
    import jax

    from simplernn_jax import __version__
    from simplernn_jax.sharding.agreement import all_reach, barrier, check_same, is_coordinator

    _note(
        _EXIT_USER_ERROR,
        f"not all processes have joined {coordinator or 'the run'} within {timeout} s: see that "
        "all run, with the same --coordinator and --num_processes and each with its own "
        "--process_id, and that all can reach that address",
    )
    _initialize(coordinator, num_processes, process_id, timeout)
    _note(EXIT_PEER_LOST, _LOST)
    try:
        if num_processes not in (None, jax.process_count()):
            raise UserError(
                f"--num_processes={num_processes}: process 0 was started with "
                f"{jax.process_count()}; give all the same number"
            )
        versions = f"simplernn_jax {__version__}, jax {jax.__version__}"
        check_same("other versions than process 0: install the same", versions)
        yield
        barrier("all is done")
        jax.distributed.shutdown()
    except UserError:
        if all_reach("an error", seconds=5):  # all have one, and process 0 says it
            said_elsewhere = not is_coordinator()
            jax.distributed.shutdown()
            if said_elsewhere:
                sys.exit(_EXIT_USER_ERROR)
        raise
    except Exception as error:
        if "Gloo" in str(error):  # a connection to another process was closed
            os._exit(EXIT_PEER_LOST)
        if isinstance(error, jax.errors.JaxRuntimeError):  # if a peer was lost, the abort comes
            time.sleep(HEARTBEAT_SECONDS + 5)
        raise


def leave(code: int) -> NoReturn:
    """Exit: at once if the others are still there, since JAX would wait for them."""
    import jax

    if not jax.distributed.is_initialized():
        sys.exit(code)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _initialize(
    coordinator: str | None, num_processes: int | None, process_id: int | None, timeout: int
) -> None:
    import jax

    host, _, port = (coordinator or "").rpartition(":")
    if coordinator and not (host and port.isdecimal() and 0 < int(port[:6]) < 2**16):
        raise UserError(f"--coordinator={coordinator}: not HOST:PORT, such as node1:12345")
    given = (coordinator, num_processes, process_id)
    if None in given and given != (None, None, None):
        raise UserError(
            "--coordinator, --num_processes and --process_id belong together: give all three, or "
            "none of them where SLURM, Kubernetes or Open MPI starts all"
        )
    is_complete = coordinator is not None
    if num_processes is not None and process_id is not None and process_id >= num_processes:
        raise UserError(
            f"--process_id={process_id} is none of --num_processes={num_processes}: number them "
            f"from 0 to {num_processes - 1}"
        )
    listens = is_complete and process_id == 0
    is_set = "JAX_COORDINATOR_BIND_ADDRESS" in os.environ
    _keep_stdout_for_python()
    # Orbax says so in every thread that saves; the loop says it once.
    logging.getLogger("absl").addFilter(lambda record: "preemption sync" not in record.getMessage())
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            cluster_detection_method="deactivate" if is_complete else None,
            coordinator_bind_address=_bind_address(host.strip("[]"), int(port))
            if listens and not is_set
            else None,
            initialization_timeout=timeout,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except (RuntimeError, OSError, KeyError, ValueError) as error:
        raise UserError(
            f"--distributed: {error}; give --coordinator HOST:PORT, --num_processes N and "
            "--process_id I, or none of them where SLURM, Kubernetes or Open MPI starts all"
        ) from error


def _bind_address(host: str, port: int) -> str | None:
    """Address to listen at: the given one if this machine has it; None is all of them."""
    try:
        address = ipaddress.ip_address(socket.getaddrinfo(host, port)[0][4][0])
        if address.is_loopback and host not in ("localhost", str(address)):
            return None  # /etc/hosts may give a machine's own name such an address
        family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
        socket.create_server((str(address), port), family=family).close()
    except OSError as error:
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            raise UserError(
                f"process 0 cannot listen at {host}:{port} ({os.strerror(error.errno)}): choose "
                "another port for all processes"
            ) from error
        return None
    return f"[{address}]:{port}" if address.version == 6 else f"{address}:{port}"


def _note(code: int, line: str) -> None:
    """Tell the parent what an abort from now on means."""
    if _notes >= 0:
        os.write(_notes, f"{code} {one_line(line)}\n".encode())


def _keep_stdout_for_python() -> None:
    """Keep Gloo from announcing there, from within C++, every connection of every device."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
    buffering = 1 if os.isatty(kept) else -1
    sys.stdout = os.fdopen(kept, "w", buffering, sys.stdout.encoding, sys.stdout.errors)
