"""Default handlers of SIGINT and SIGTERM in a script.

They exit at once, without an exception: one raised inside a callback of JAX would be swallowed
there. `training.interruption` replaces them while a run takes its steps.

| when | code |
|---|---|
| SIGINT before a run has touched its workdir, or in a script that resumes nothing | 130 |
| SIGTERM in a script that resumes nothing | 143 |
| SIGTERM in scripts/train.py at any moment, SIGINT there from then on | 75 |
"""

import contextlib
import os
import signal
import sys

from simplernn_jax.errors import EXIT_INTERRUPTED

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class _Run:
    """State of the script that a signal interrupts."""

    resumes = False
    has_started = False


def install(*, resumes: bool, handle: bool = True) -> None:
    """Let both signals end this process, pending ones too, and unblock them.

    Args:
      resumes: the same command resumes an interrupted script.
      handle: False leaves Python's handlers, as a debugger expects them, and only unblocks.
    """
    _Run.resumes = resumes
    if handle:
        for number in _SIGNALS:
            signal.signal(number, _stop)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


def run_starts() -> None:
    """Record that the run can be resumed from now on."""
    _Run.has_started = True


def raise_from_now() -> None:
    """Let signals raise, for a script that has temporary folders and child processes to clean up.

    SIGINT raises KeyboardInterrupt, SIGTERM SystemExit with code 143.
    """

    def leave(number: int, _: object) -> None:
        sys.exit(128 + number)

    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, leave)


def _stop(number: int, _: object) -> None:
    code, what = 128 + number, "stopped"
    if _Run.has_started:
        code, what = EXIT_INTERRUPTED, "stopped; run the same command to resume"
    elif _Run.resumes:
        what = "stopped before the run started; run the same command to start it"
        code = EXIT_INTERRUPTED if number == signal.SIGTERM else code
    with contextlib.suppress(Exception):  # such as a write that the signal has interrupted
        sys.stdout.flush()
    # A progress bar hides the cursor.
    show_cursor = "\x1b[?25h" if os.isatty(2) and os.environ.get("TERM", "dumb") != "dumb" else ""
    with contextlib.suppress(OSError):
        os.write(2, f"{show_cursor}{signal.Signals(number).name}: {what}\n".encode())
    os._exit(code)
