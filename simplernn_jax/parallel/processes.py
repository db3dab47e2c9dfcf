"""This process as one of several that train together: how it joins them, and how it leaves.

Whatever ends one process ends all of them within half a minute, each with one line that says who
was first. They are started again together, and the run goes on from its last checkpoint.
"""

import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import NoReturn

import jax
from jax.errors import JaxRuntimeError

from simplernn_jax.errors import UserError
from simplernn_jax.parallel.agreement import wait_for_all
from simplernn_jax.parallel.peers import SILENCE_SECONDS, Lost, Peers
from simplernn_jax.parallel.rendezvous import Place, meet

EXIT_PEER_LOST = 76
"""Another process of the run died or hangs (EX_PROTOCOL): the same commands go on."""

_EXIT_ERROR = 2
"""Bad input, as in `command_line`; here also when another process has ended with an error of its
own, which starting all again does not mend."""

_JAX_HEARTBEAT_SECONDS = 600
"""JAX's own watch aborts after that. `Peers` is quicker, and spares processes that were all stopped
for a while and go on together."""
_JAX_START_SECONDS = 60

_peers: Peers | None = None
_said = threading.Lock()


@contextlib.contextmanager
def joined(
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    timeout: float,
) -> Iterator[None]:
    """Inside, this is one process of the run, and ``jax.devices()`` are those of all.

    To be entered before anything touches a device, with all three of the first arguments, or with
    none where SLURM, Kubernetes (with its Python package) or Open MPI started this process.

    Args:
      coordinator: ``HOST:PORT`` at which process 0 is found.
      num_processes: how many there are.
      process_id: which of them this is, from 0.
      timeout: seconds in which all must have come.

    Raises:
      UserError: what was given is incomplete, or not all have come (`rendezvous.meet`).
    """
    global _peers  # noqa: PLW0603 - a process is one process of one run
    place, local_devices = _place(coordinator, num_processes, process_id, timeout)
    members, connections = meet(place, timeout)
    _peers = Peers(members, place.number, connections, _end_since_lost)
    _speak_when_aborted()
    _keep_stdout_for_python()
    # Its handler of SIGTERM would stand in the way of ours.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            place.coordinator,
            place.count,
            place.number,
            local_device_ids=local_devices,
            cluster_detection_method="deactivate",
            initialization_timeout=_JAX_START_SECONDS,
            heartbeat_timeout_seconds=_JAX_HEARTBEAT_SECONDS,
        )
        yield
        wait_for_all("all is done")
        jax.distributed.shutdown()
    except BaseException as error:
        if _is_said_by_another(error):
            sys.exit(_EXIT_ERROR)
        raise
    _peers.say_bye()
    _peers = None


def leave(code: int) -> NoReturn:
    """Ends this process: at once if it fails as one of several, since JAX would wait for them."""
    if _peers is None:
        sys.exit(code)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _place(
    coordinator: str | None, num_processes: int | None, process_id: int | None, timeout: float
) -> tuple[Place, list[int] | None]:
    given = (coordinator, num_processes, process_id)
    if None not in given:
        assert coordinator is not None
        assert num_processes is not None
        assert process_id is not None
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
            raise UserError(f"--coordinator={coordinator}: not HOST:PORT, such as node1:12345")
        if not 0 <= process_id < num_processes:
            raise UserError(
                f"--process_id={process_id} is none of --num_processes={num_processes}: number "
                f"them from 0 to {num_processes - 1}"
            )
        return Place(coordinator, process_id, num_processes), None
    if given != (None, None, None):
        raise UserError(
            "--coordinator, --num_processes and --process_id belong together: give all three, or "
            "none where SLURM, Kubernetes or Open MPI says them"
        )
    return _detected_place(timeout)


def _detected_place(timeout: float) -> tuple[Place, list[int] | None]:
    """As JAX finds it out in ``jax.distributed.initialize()``."""
    from jax._src.clusters import ClusterEnv

    try:
        coordinator, count, number, devices = ClusterEnv.auto_detect_unset_distributed_params(
            None, None, None, None, None, int(timeout)
        )
    except (RuntimeError, OSError, KeyError, ValueError) as error:
        raise UserError(
            f"--distributed: {error}; mend that, or give --coordinator, --num_processes and "
            "--process_id"
        ) from error
    if coordinator is None or count is None or number is None:
        raise UserError(
            "--distributed: neither SLURM nor Kubernetes nor Open MPI has started this process; "
            "say where the others are with --coordinator HOST:PORT --num_processes N "
            "--process_id I"
        )
    return Place(coordinator, number, count), None if devices is None else list(devices)


def _is_said_by_another(error: BaseException) -> bool:
    """Tells the others that this process ends. Does not return if it ends because of one of them.

    Returns:
      Whether process 0 ends with the same error.
    """
    assert _peers is not None
    if isinstance(error, JaxRuntimeError):
        # Most likely what a collective makes of a lost peer: `_end_since_lost` then comes.
        threading.Event().wait(SILENCE_SECONDS + 5)
    own_words = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    return _peers.say_error(own_words) and isinstance(error, UserError)


def _end_since_lost(lost: Lost) -> NoReturn:
    _say(lost)
    if _peers is not None:
        _peers.let_the_others_end()
    os._exit(_EXIT_ERROR if lost.own_words else EXIT_PEER_LOST)


def _say(lost: Lost | None) -> None:
    """Prints one line, from whichever thread comes first; another one waits for the end."""
    if not _said.acquire(blocking=False):
        threading.Event().wait()
    who = "JAX has aborted this process, for the reason above" if lost is None else str(lost)
    line = f"error: {' '.join(who.split())}"
    if lost is None or not lost.own_words:
        line += "; start all processes again, and the run goes on from its last checkpoint"
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        os.write(2, f"{line}\n".encode())


def _speak_when_aborted() -> None:
    """Says who was lost when JAX's runtime aborts this process before `Peers` has ended it.

    It does so from a thread of its own, in C++ and at once when process 0 has died. Python's own
    signal handlers would run later, in the main thread, and never: hence ctypes.
    """

    def on_abort(_: int) -> None:
        lost = None if _peers is None else _peers.lost or _peers.lost_coordinator()
        _say(lost)
        os._exit(EXIT_PEER_LOST)

    handler_type = ctypes.CFUNCTYPE(None, ctypes.c_int)
    _kept_alive.append(handler_type(on_abort))
    set_handler = ctypes.CDLL(None).signal
    set_handler.argtypes = (ctypes.c_int, handler_type)
    set_handler.restype = ctypes.c_void_p
    set_handler(signal.SIGABRT, _kept_alive[-1])


def _keep_stdout_for_python() -> None:
    """Without it, Gloo announces every connection of every device there, from within C++."""
    sys.stdout.flush()
    kept = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
    buffering = 1 if os.isatty(kept) else -1
    sys.stdout = os.fdopen(kept, "w", buffering, sys.stdout.encoding, sys.stdout.errors)


_kept_alive: list[object] = []
"""Handlers that C may call; Python must not free them."""
