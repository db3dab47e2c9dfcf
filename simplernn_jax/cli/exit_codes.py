"""Exit codes of all scripts, and errors as one line on standard error.

| code | meaning |
|---|---|
| 0 | done |
| 1 | a bug, with its traceback; or a check of the script fails (see its ``--help``) |
| 2 | bad input, disk full or out of memory: one line says what, where and what to do |
| 75 | training interrupted by SIGTERM or Ctrl-C; the same command resumes it |
| 76 | a peer process died, was suspended, or became unreachable; the same commands resume the run |
| 130 | Ctrl-C, with nothing to resume |
| 143 | SIGTERM, with nothing to resume |
| 128 + n | ended by signal n, such as 141 for a closed pipe, 137 for SIGKILL |
"""

import contextlib
import errno
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from absl import flags

from simplernn_jax.errors import DISK_ADVICE, EXIT_USER_ERROR, UserError, one_line
from simplernn_jax.project import name_commands

_ADVICE = DISK_ADVICE | {errno.ENOENT: "create it", errno.EISDIR: "specify a file"}
"""Advice for a file-system error. One without a path that is not listed here is a bug and keeps its
traceback."""


def exit_with(
    main: Callable[[], int | None], leave: Callable[[int], NoReturn] = sys.exit
) -> NoReturn:
    """Run `main` and exit with its code (None is 0), by ``leave(code)``.

    A `UserError`, a wrong flag, a file-system error that the user can fix, or lack of memory is one
    line on stderr and code 2; Ctrl-C is code 130. Anything else is a bug and keeps its traceback.
    """
    leave(_run(main))


def _run(main: Callable[[], int | None]) -> int:
    """Run `main`, report its error and return the exit code."""
    try:
        try:
            return main() or 0
        finally:
            sys.stdout.flush()
    except UserError as error:
        return _report(str(error))
    except flags.Error as error:
        return _report(f"{error}; --help shows the flags")
    except BrokenPipeError:  # closed by the reader, as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.filename is None and error.errno not in _ADVICE:
            return _show_bug()
        what = (error.strerror or str(error)).lower()
        advice = _ADVICE.get(error.errno or 0, "")
        advice = f"{advice}, or choose another path" if advice else "choose another path"
        is_named = isinstance(error.filename, str | bytes)
        path = error.filename if is_named else "writing a file"  # by a failed write()
        return _report(f"{os.fsdecode(path)}: {what}; {advice}")
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if _is_out_of_memory(error):
            return _report(f"not enough memory: {error}; choose smaller sizes, or free some")
        if isinstance(error, RuntimeError) and "home directory" in str(error):  # of pathlib
            return _report("~: no such user, or one without a home directory; use absolute paths")
        return _show_bug()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)


def _is_out_of_memory(error: Exception) -> bool:
    is_of_jax = type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError")
    return isinstance(error, MemoryError) or (is_of_jax and "RESOURCE_EXHAUSTED" in str(error))


def _show_bug() -> int:
    traceback.print_exc()
    return 1


def _report(message: str) -> int:
    # The library names fields as Python does.
    message = re.sub(
        r"(?<![\w./-])config(?=\.(model|data|optimizer|train|mesh)\b)", "--config", message
    )
    with contextlib.suppress(OSError):
        print(f"error: {one_line(name_commands(message))}", file=sys.stderr, flush=True)
    return EXIT_USER_ERROR
