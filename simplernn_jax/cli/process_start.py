"""Start of a script's process: the right Python, huge pages, handlers of signals.

Standard library only, and no syntax after Python 3.8: this runs first, also under a Python that
cannot run the project.

SIGINT and SIGTERM end a script at once, without an exception, which a callback of JAX could
swallow. `training.loop` replaces these handlers while a run takes steps.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import sys
import time
from functools import partial

from simplernn_jax.errors import EXIT_INTERRUPTED, EXIT_USER_ERROR

HUGE_PAGES = "SIMPLERNN_JAX_HUGE_PAGES"
"""Environment variable; 0 leaves glibc's memory allocator as it is."""

STARTED = time.monotonic()
"""When this process, or the Python that replaced it, began."""

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_TUNABLES = (
    "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=268435456"
    ":glibc.malloc.trim_threshold=1073741824"
)


def start(root: str, *, resumes: bool = False) -> None:
    """Prepare this process, replacing it by another Python or other settings where needed.

    Call it with SIGINT and SIGTERM blocked, so that none is lost; it unblocks them.
    Exits with code 2 and one line if neither this Python nor ``.venv`` has the project's packages.

    Args:
      root: folder that holds ``.venv``, if there is one.
      resumes: an interrupted command resumes when it is run again.
    """
    _use_python_with_packages(root)
    _use_huge_pages()
    if not _is_observed():  # a debugger expects Python's own handlers
        for number in _SIGNALS:
            signal.signal(number, partial(_stop, resumes))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


def raise_on_signals() -> None:
    """Let signals raise, for a script that has temporary folders and child processes to clean up.

    SIGINT raises KeyboardInterrupt, SIGTERM SystemExit with code 143.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))


def has_huge_pages() -> bool:
    """Return whether this is Linux with glibc 2.35 or later."""
    try:
        library, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").split()
        return library == "glibc" and tuple(map(int, version.split(".")[:2])) >= (2, 35)
    except (AttributeError, OSError, ValueError):
        return False


def _use_python_with_packages(root: str) -> None:
    """Replace a Python that lacks the project's packages by the one in ``.venv``."""
    missing = [name for name in ("absl", "jax", "flax") if not importlib.util.find_spec(name)]
    if sys.version_info >= (3, 11) and not missing:
        return
    python = os.path.join(root, ".venv", "bin", "python")
    if sys.executable != python and os.access(python, os.X_OK):
        os.execv(python, [python, *sys.argv])
    problem = f"has no {missing[0]}" if missing else "is too old"
    print(
        f"error: Python {sys.version.split()[0]} at {sys.executable} {problem}; run "
        "`bash scripts/train.sh`, which creates .venv, or `pip install -e .` with Python 3.11, "
        "3.12 or 3.13",
        file=sys.stderr,
    )
    sys.exit(EXIT_USER_ERROR)


def _use_huge_pages() -> None:
    """Restart with huge pages for large buffers, which glibc reads once, when a process starts.

    The arrays of a train step are allocated at every step. Huge pages avoid most page faults, and
    smaller arrays (256 MiB) stay in memory that the allocator keeps, up to 1 GiB of it.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if (
        os.environ.get(HUGE_PAGES) == "0"
        or "glibc.malloc.hugetlb" in tunables
        or not has_huge_pages()
    ):
        return
    # Not a program that runs a script by `runpy`.
    if _is_observed() or not sys.executable or sys.argv[0] not in sys.orig_argv:
        return
    os.environ["GLIBC_TUNABLES"] = f"{tunables}:{_TUNABLES}".lstrip(":")
    with contextlib.suppress(OSError):
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _is_observed() -> bool:
    """Return whether a tool that cannot follow a restart runs the script, or a prompt follows."""
    tools = ("bdb", "debugpy", "pydevd", "coverage", "pytest")
    is_traced = sys.gettrace() or sys.getprofile() or sys.flags.inspect
    return bool(is_traced) or any(name in sys.modules for name in tools)


def _stop(resumes: bool, number: int, _: object) -> None:
    """End the process with the code for SIGINT or SIGTERM, and one line on stderr."""
    with contextlib.suppress(Exception):  # such as a write that the signal has interrupted
        sys.stdout.flush()
    # A progress bar hides the cursor.
    has_cursor = os.isatty(2) and os.environ.get("TERM", "dumb") != "dumb"
    what = "stopped; run the same command to resume" if resumes else "stopped"
    line = f"{signal.Signals(number).name}: {what}\n"
    with contextlib.suppress(OSError):
        os.write(2, ("\x1b[?25h" * has_cursor + line).encode())
    os._exit(EXIT_INTERRUPTED if resumes else 128 + number)
