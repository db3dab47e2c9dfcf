"""The exception for everything that a user can fix, exit codes, and the wording of numbers."""

import contextlib
import errno
import math
from collections.abc import Iterable, Iterator

EXIT_USER_ERROR = 2
"""Bad input, or a condition of the machine that the user can fix: a `UserError`."""
EXIT_INTERRUPTED = 75
"""A run was interrupted by SIGTERM or SIGINT; the same command resumes it (EX_TEMPFAIL)."""
EXIT_PEER_FAILURE = 76
"""A peer process died, was suspended or unreachable (EX_PROTOCOL); the same commands resume it."""

DISK_ADVICE = {
    errno.ENOSPC: "free some space there",
    errno.EDQUOT: "free some of the quota",
    errno.EROFS: "make it writable",
    errno.EACCES: "allow access to it",
    errno.EPERM: "allow access to it",
    errno.EIO: "check this disk",
    errno.EFBIG: "allow larger files (ulimit -f)",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
}
"""Advice about a file-system error, other than to choose another path."""

MAX_MESSAGE = 400
"""Characters of a message: a corrupted file may quote megabytes of itself."""


class UserError(Exception):
    """Bad input, or a condition of the machine that the user can fix.

    The message is one line: where, what is wrong, and what to do. The scripts
    print it as ``error: MESSAGE`` and exit with code 2 (`cli.command_line`).
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


@contextlib.contextmanager
def library_errors(problem: str, advice: str) -> Iterator[None]:
    """Turn what a library raises for bad input, which can be anything, into a `UserError`.

    Its message is ``PROBLEM (error); ADVICE``; `UserError` and `MemoryError` are raised unchanged.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except BaseException as error:
        # Rust's PanicException is not an Exception, and cannot be imported.
        if not isinstance(error, Exception) and type(error).__module__ != "pyo3_runtime":
            raise
        raise UserError(f"{problem} ({type(error).__name__}: {error}); {advice}") from error


def one_line(text: str, limit: int = MAX_MESSAGE) -> str:
    """Return one printable line: control characters escaped, the middle of a long text omitted."""
    text = " ".join(part.strip() for part in text[: 100 * limit].splitlines())
    if len(text) > limit:
        end = limit // 3
        text = f"{text[: limit - end]} ... {text[-end:]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def format_bytes(num_bytes: float) -> str:
    """Format with three digits and a decimal unit: ``4.8 TB``; ``0 B`` below one byte."""
    num_bytes = float(f"{num_bytes:.3g}")
    if num_bytes < 1:
        return "0 B"
    power = min(int(math.log10(num_bytes)) // 3, 6)
    return f"{num_bytes / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB', 'PB', 'EB')[power]}"


def counted(number: int, noun: str) -> str:
    """Return ``1 token`` or ``1,000 tokens``."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def nearest_name(name: str, names: Iterable[str]) -> str:
    """Return ``"; did you mean 'steps'?"``, or an empty string if no name is close."""
    import difflib  # slow: not at every start of a script

    near = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
