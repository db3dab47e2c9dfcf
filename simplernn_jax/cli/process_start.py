"""Start of a script's process: the right Python, huge pages, handlers of signals.

Standard library only, and no syntax after Python 3.8: this runs first, also under a Python that
cannot run the project, and twice if the process replaces itself.

SIGINT and SIGTERM end a script at once, without an exception, which a callback of JAX could
swallow. `training.loop` replaces these handlers while a run takes steps.

| when | code |
|---|---|
| SIGINT before the workdir is created, or in a script that resumes nothing | 130 |
| SIGTERM in a script that resumes nothing | 143 |
| SIGTERM in scripts/train.py at any moment, SIGINT there from then on | 75 |
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import os
import signal
import sys

from simplernn_jax.errors import EXIT_INTERRUPTED, EXIT_USER_ERROR, one_line

HUGE_PAGES = "SIMPLERNN_JAX_HUGE_PAGES"
"""Environment variable; 0 leaves glibc's memory allocator as it is."""

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_IN_VENV = "_SIMPLERNN_JAX_IN_VENV"
"""Environment variable: id of the process that has replaced its Python, which it does only once."""
_OLDEST_PYTHON = (3, 11)
_PACKAGES = ("absl", "jax", "flax")
_TUNABLE = "glibc.malloc.hugetlb"
_UNCHECKED = ("JAX_PLATFORMS", "JAX_COMPILATION_CACHE_DIR")
"""Variables that JAX does not parse when it is imported."""


def start(root: str, *, resumes: bool = False) -> None:
    """Prepare this process, replacing it by another Python or other settings where needed.

    Call it with SIGINT and SIGTERM blocked, so that none is lost; it unblocks them.
    Exits with code 2 and one line if neither this Python nor ``.venv`` has the project's packages.

    Args:
      root: folder that holds ``.venv``, if there is one.
      resumes: an interrupted command resumes when it is run again.
    """
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed: the next opened file would get its number
            null = os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(null, True)
            setattr(sys, name, os.fdopen(null, "r" if name == "stdin" else "w"))
    _use_python_with_packages(root)
    _use_huge_pages()
    if resumes:
        _Ending.codes = (128 + signal.SIGINT, EXIT_INTERRUPTED)
        _Ending.what = "stopped before the run started; run the same command to start it"
    for number in _SIGNALS:
        if not _is_observed():  # a debugger expects Python's own handlers
            signal.signal(number, _stop)
        # When Python ends it restores default handlers: a signal would replace the exit code.
        atexit.register(signal.signal, number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    _check_environment_variables()


def run_starts() -> None:
    """Record that the run can be resumed from now on."""
    _Ending.codes = (EXIT_INTERRUPTED, EXIT_INTERRUPTED)
    _Ending.what = "stopped; run the same command to resume"


def raise_on_signals() -> None:
    """Let signals raise, for a script that has temporary folders and child processes to clean up.

    SIGINT raises KeyboardInterrupt, SIGTERM SystemExit with code 143. What a handler raises in a
    finalizer or in a callback of the garbage collector (JAX has one) is lost: the signal is then
    sent again.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    report = sys.unraisablehook

    def send_again(lost: sys.UnraisableHookArgs) -> None:
        if isinstance(lost.exc_value, KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        elif isinstance(lost.exc_value, SystemExit):
            signal.raise_signal(signal.SIGTERM)
        else:
            report(lost)

    sys.unraisablehook = send_again


def has_huge_pages() -> bool:
    """Return whether this is Linux with glibc 2.35 or later."""
    try:
        library, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").split()
        return library == "glibc" and tuple(map(int, version.split(".")[:2])) >= (2, 35)
    except (AttributeError, OSError, ValueError):
        return False


def _use_python_with_packages(root: str) -> None:
    """Replace a Python that lacks the project's packages by the one in ``.venv``."""
    problem = _problem_of_this_python()
    if not problem:
        return
    python = os.path.join(root, ".venv", "bin", "python")
    if os.environ.get(_IN_VENV) != str(os.getpid()) and os.access(python, os.X_OK):
        os.environ[_IN_VENV] = str(os.getpid())
        with contextlib.suppress(OSError):
            os.execv(python, [python, *sys.argv])
    version = "{}.{}".format(*sys.version_info[:2])
    print(
        f"error: Python {version} at {sys.executable} {problem}; run `bash scripts/train.sh`, "
        "which creates .venv, or `pip install -e .` with Python 3.11, 3.12 or 3.13",
        file=sys.stderr,
    )
    sys.exit(EXIT_USER_ERROR)


def _problem_of_this_python() -> str:
    if sys.version_info < _OLDEST_PYTHON:
        return "is too old"
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    return f"has no {missing[0]}" if missing else ""


def _use_huge_pages() -> None:
    """Restart with huge pages for large buffers, which glibc reads once, when a process starts.

    The arrays of a train step are remapped at every step; huge pages avoid most page faults.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if os.environ.get(HUGE_PAGES) == "0" or _TUNABLE in tunables or not has_huge_pages():
        return
    # Not a program that runs a script by `runpy`.
    if _is_observed() or not sys.executable or sys.argv[0] not in sys.orig_argv:
        return
    os.environ["GLIBC_TUNABLES"] = f"{tunables}:{_TUNABLE}=1".lstrip(":")
    with contextlib.suppress(OSError):
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _is_observed() -> bool:
    """Return whether a tool that cannot follow a restart runs the script, or a prompt follows."""
    tools = ("bdb", "debugpy", "pydevd", "coverage", "pytest")
    is_traced = sys.gettrace() or sys.getprofile() or sys.flags.inspect
    return bool(is_traced) or any(name in sys.modules for name in tools)


class _Ending:
    """How SIGINT and SIGTERM end this process; JAX replaces the handlers of a distributed run."""

    codes = (128 + signal.SIGINT, 128 + signal.SIGTERM)
    what = "stopped"


def _stop(number: int, _: object) -> None:
    """End the process with the code for SIGINT or SIGTERM, and one line on stderr."""
    with contextlib.suppress(Exception):  # such as a write that the signal has interrupted
        sys.stdout.flush()
    # A progress bar hides the cursor.
    has_cursor = os.isatty(2) and os.environ.get("TERM", "dumb") != "dumb"
    line = f"{signal.Signals(number).name}: {_Ending.what}\n"
    with contextlib.suppress(OSError):
        os.write(2, ("\x1b[?25h" * has_cursor + line).encode())
    os._exit(_Ending.codes[number == signal.SIGTERM])


def _check_environment_variables() -> None:
    """Reject a variable that makes importing JAX fail."""
    os.environ.pop("MPLBACKEND", None)  # plots go to files; a wrong name breaks matplotlib
    names = [name for name in os.environ if name.startswith("JAX_") and name not in _UNCHECKED]
    if not names:
        return
    try:
        import jax  # noqa: F401
    except ValueError as error:
        wrong = [name for name in names if name.lower() in str(error).lower()] or names
        values = ", ".join(f"{name}={os.environ[name]}" for name in wrong)
        print(one_line(f"error: {values}: {error}; correct or unset it"), file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
