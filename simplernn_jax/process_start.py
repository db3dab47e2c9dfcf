"""Start of a script's process: streams, huge pages, the right Python, handlers of signals.

Standard library only, no syntax after Python 3.8, and few imports: this runs first, also under a
Python that cannot run the project, and twice if the process replaces itself.

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
import os
import signal
import sys
import threading
from collections.abc import Iterator

from simplernn_jax.errors import EXIT_INTERRUPTED, EXIT_USER_ERROR, one_line

HUGE_PAGES = "SIMPLERNN_JAX_HUGE_PAGES"
"""Environment variable; 0 leaves glibc's memory allocator as it is."""

_IN_VENV = "_SIMPLERNN_JAX_IN_VENV"
"""Environment variable: id of the process that has replaced its Python, which it does only once."""
_TUNABLE = "glibc.malloc.hugetlb"
_OLDEST_PYTHON = (3, 11)
_PACKAGES = ("absl", "jax", "flax")
_UNCHECKED = ("JAX_PLATFORMS", "JAX_COMPILATION_CACHE_DIR")
"""Variables that JAX does not parse when it is imported."""
_OBSERVERS = ("bdb", "debugpy", "pydevd", "coverage", "pytest")
"""Modules of debuggers and similar tools, which cannot follow a process that replaces itself."""


class _Run:
    """State of the script that a signal interrupts."""

    resumes = False
    has_started = False
    temporary_folder = ""


def start(root: str, *, resumes: bool = False) -> None:
    """Prepare this process, replacing it by another Python or other settings where needed.

    Call it with SIGINT and SIGTERM blocked, so that none is lost; it unblocks them.
    Exits with code 2 and one line if neither this Python nor ``.venv`` has the project's packages.

    Args:
      root: folder that holds ``.venv``, if there is one.
      resumes: an interrupted command resumes when it is run again.
    """
    _open_closed_streams()
    tunables = _tunables_to_set()
    if tunables is not None:
        os.environ["GLIBC_TUNABLES"] = tunables
        _exec([sys.executable, *sys.orig_argv[1:]])
    problem = _problem_of_this_python()
    if problem:
        python = os.path.join(root, ".venv", "bin", "python")
        if os.environ.get(_IN_VENV) == str(os.getpid()) or not os.access(python, os.X_OK):
            _reject(problem)
        os.environ[_IN_VENV] = str(os.getpid())
        _exec([python, *sys.argv])
        _reject(problem)
    _Run.resumes = resumes
    signals = (signal.SIGINT, signal.SIGTERM)
    if not _is_observed():  # a debugger expects Python's own handlers
        for number in signals:
            signal.signal(number, _stop)
            # When Python ends it restores default handlers: a signal would replace the exit code.
            atexit.register(signal.signal, number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
    _check_environment_variables()


def run_starts() -> None:
    """Record that the run can be resumed from now on."""
    _Run.has_started = True


def raise_on_signals() -> None:
    """Let signals raise, for a script that has temporary folders and child processes to clean up.

    SIGINT raises KeyboardInterrupt, SIGTERM SystemExit with code 143. What a handler raises in a
    finalizer or in a callback of the garbage collector (JAX has one) is lost; the signal is then
    sent again.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    sys.unraisablehook = _send_again


def discard_output_of_libraries() -> None:
    """Keep stdout for Python: what libraries print in C or C++ is discarded from now on."""
    sys.stdout.flush()
    sys.stdout = os.fdopen(os.dup(1), "w", -1, sys.stdout.encoding, sys.stdout.errors)
    with open(os.devnull, "wb") as null:
        os.dup2(null.fileno(), 1)


@contextlib.contextmanager
def temporary_folder() -> Iterator[str]:
    """Yield a new folder that is removed afterwards, also when a signal ends the script."""
    import tempfile  # slow, and few scripts need it

    with tempfile.TemporaryDirectory() as folder:
        _Run.temporary_folder = folder
        yield folder


def end_with_parent(parent: int) -> None:
    """Have Linux kill this process when its parent, of process id `parent`, has died."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(128 + signal.SIGKILL)


def _send_again(lost: sys.UnraisableHookArgs) -> None:
    number = {KeyboardInterrupt: signal.SIGINT, SystemExit: signal.SIGTERM}.get(lost.exc_type)
    if number is None:
        sys.__unraisablehook__(lost)
    else:  # later, outside the finalizer
        threading.Timer(0.05, os.kill, (os.getpid(), number)).start()


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
    if _Run.temporary_folder:
        import shutil

        shutil.rmtree(_Run.temporary_folder, ignore_errors=True)
    os._exit(code)


def _exec(command: list[str]) -> None:
    """Replace this process; signals that are blocked stay pending. Return only if that fails."""
    try:
        os.execv(command[0], command)
    except OSError:
        return


def _open_closed_streams() -> None:
    """Open the null device where a standard stream is closed, as by ``>&-``.

    Otherwise the next opened file would get its number and receive the output.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", closefd=False))


def _problem_of_this_python() -> str | None:
    if sys.version_info < _OLDEST_PYTHON:
        return "is too old"
    import importlib.util  # slow, and not needed by a process that replaces itself

    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    return f"has no {missing[0]}" if missing else None


def _reject(problem: str) -> None:
    version = "{}.{}".format(*sys.version_info[:2])
    print(
        f"error: Python {version} at {sys.executable} {problem}; run `bash scripts/train.sh`, "
        "which creates .venv, or `pip install -e .` with Python 3.11, 3.12 or 3.13",
        file=sys.stderr,
    )
    sys.exit(EXIT_USER_ERROR)


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


def _tunables_to_set() -> str | None:
    """Return ``GLIBC_TUNABLES`` with huge pages for large buffers, or None to leave it unchanged.

    The arrays of a train step are remapped at every step; huge pages avoid most page faults.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if os.environ.get(HUGE_PAGES) == "0" or _TUNABLE in tunables:
        return None
    if not has_huge_pages() or not _is_plain_run():
        return None
    return f"{tunables}:{_TUNABLE}=1".lstrip(":")


def has_huge_pages() -> bool:
    """Return whether this is Linux with glibc 2.35 or later."""
    try:
        library, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").split()
        return library == "glibc" and tuple(map(int, version.split(".")[:2])) >= (2, 35)
    except (AttributeError, OSError, ValueError):
        return False


def _is_observed() -> bool:
    """Return whether a debugger or the like runs the script, or a prompt follows (`python -i`)."""
    if sys.gettrace() or sys.getprofile() or sys.flags.inspect:
        return True
    return any(name in sys.modules for name in _OBSERVERS)


def _is_plain_run() -> bool:
    """Return whether this is ``python [options] SCRIPT ...``, with nothing that observes it."""
    if _is_observed() or not sys.executable:
        return False
    arguments = iter(getattr(sys, "orig_argv", [])[1:])
    for argument in arguments:
        if argument in ("-X", "-W"):
            next(arguments, None)
        elif not argument.startswith("-"):
            return argument == sys.argv[0]
        elif not argument.startswith(("-X", "-W", "--")) and set(argument) & set("cm"):
            return False
    return False
