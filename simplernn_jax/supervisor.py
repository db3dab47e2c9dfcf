"""A parent process that turns an abort inside JAX into one line and an exit code.

JAX's coordination service ends a process from within C++ when a peer fails, so each process of a
distributed run trains in a child of itself. JAX does not survive a fork: nothing here imports it.
"""

import ctypes
import mmap
import os
import signal
import sys
from types import FrameType

from simplernn_jax.errors import EXIT_PEER_LOST, one_line

HEARTBEAT_SECONDS = 20
"""A process that sends no heartbeat for this long counts as lost."""

_failure = mmap.mmap(-1, 4096)
"""Memory that the child shares with its parent: the exit code and the line of an abort."""


def supervise() -> None:
    """Continue in a child process, while this one waits for it and exits with its code.

    The first SIGTERM or SIGINT is forwarded as SIGTERM, a second one kills the child. To be called
    before anything imports jax.
    """
    parent, signals = os.getpid(), (signal.SIGTERM, signal.SIGINT)
    sys.stdout.flush()
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    child = os.fork()
    if child == 0:
        end_with_parent(parent)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
        return
    first = iter([signal.SIGTERM])

    def forward(number: int, frame: FrameType | None) -> None:
        os.kill(child, next(first, signal.SIGKILL))

    for number in signals:
        signal.signal(number, forward)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    failure_code, _, line = _failure[:].rstrip(b"\0").decode().partition(" ")
    if failure_code and code in (-signal.SIGABRT, EXIT_PEER_LOST):
        code = int(failure_code)
        print(f"error: {line}", file=sys.stderr, flush=True)
    os._exit(code if code >= 0 else 128 - code)


def set_failure(code: int, line: str) -> None:
    """Tell the parent the exit code and the line of an abort that happens from now on."""
    _failure[:] = f"{code} {one_line(line)}".encode().ljust(len(_failure), b"\0")


def end_with_parent(parent: int) -> None:
    """Have Linux kill this process when its parent, of process id `parent`, has died."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(128 + signal.SIGKILL)
