"""A parent process that reports an abort inside JAX as one line and an exit code.

JAX's coordination service aborts a process from within C++ when a peer fails, so each process of a
distributed run trains in a child process. JAX does not survive a fork: nothing here imports it.
"""

import mmap
import os
import signal
import sys

from simplernn_jax.devices import end_with_parent
from simplernn_jax.errors import EXIT_INTERRUPTED, EXIT_PEER_FAILURE, one_line

HEARTBEAT_SECONDS = 20
"""A process that sends no heartbeat for this long is considered failed."""

_abort_reason = mmap.mmap(-1, 4096)
"""Exit code and line of an abort, in memory that the child shares with its parent."""


def supervise() -> None:
    """Continue in a child process, while this one waits for it and exits with its code.

    Call it before importing jax. SIGTERM and SIGINT are forwarded as SIGTERM; a second one kills
    the child (exit code 137).
    """
    parent, signals = os.getpid(), (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)
    sys.stdout.flush()
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    child = os.fork()
    if child == 0:
        end_with_parent(parent)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
        return
    forwarded, ended, status = iter([signal.SIGTERM]), 0, 0
    while not ended:
        # They stay blocked: one that arrives just before a call of `waitpid` would not end it.
        if signal.sigwait(signals) == signal.SIGCHLD:
            ended, status = os.waitpid(child, os.WNOHANG)
        else:
            os.kill(child, next(forwarded, signal.SIGKILL))
    code = os.waitstatus_to_exitcode(status)
    if code == -signal.SIGTERM:  # while it waited for its peers
        code = EXIT_INTERRUPTED
        print("SIGTERM: stopped; run the same command to start it", file=sys.stderr, flush=True)
    abort_code, _, line = _abort_reason[:].rstrip(b"\0").decode().partition(" ")
    if abort_code and code in (-signal.SIGABRT, EXIT_PEER_FAILURE):
        code = int(abort_code)
        print(f"error: {line}", file=sys.stderr, flush=True)
    os._exit(code if code >= 0 else 128 - code)


def set_abort_reason(code: int, line: str) -> None:
    """Tell the parent the exit code and the line of an abort that happens from now on."""
    _abort_reason[:] = f"{code} {one_line(line)}".encode().ljust(len(_abort_reason), b"\0")
