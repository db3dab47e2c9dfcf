"""What every script shares: flags, one-line errors, quiet logs.

A script defines its flags at module level and ends with ``command_line.run(main)``:

    _CONFIG = command_line.define_config_flag()

    def main() -> int | None:
        config = _CONFIG.value

    if __name__ == "__main__":
        command_line.run(main)

Exit codes of all scripts:

| code | meaning |
|---|---|
| 0 | done |
| 1 | a bug, with its traceback; or what the script checks does not hold (its ``--help`` says) |
| 2 | bad input, no room on the disk or in memory: one line says what, where and what to do |
| 75 | a training run was stopped by SIGTERM or Ctrl-C; the same command resumes it |
| 76 | another process of the run died or hangs: one line says which; the same commands resume it |
| 130 | Ctrl-C, where there is nothing to resume |
| 143 | SIGTERM, where there is nothing to resume |
| 128 + n | ended by signal n, such as 141 where the reader of a pipe has gone, 137 for SIGKILL |
"""

import contextlib
import errno
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from absl import app, flags
from absl import logging as absl_logging

from simplernn_jax.config import nearest_name
from simplernn_jax.config_flag import config_fields, config_is_missing, define_config_flag
from simplernn_jax.errors import EXIT_INTERRUPTED, EXIT_USER_ERROR, UserError, one_line
from simplernn_jax.files import read_file

__all__ = [
    "EXIT_INTERRUPTED",
    "Arguments",
    "define_arguments",
    "define_checkpoint_flag",
    "define_config_flag",
    "define_corpus_flags",
    "expand_path",
    "read_text",
    "run",
]

_LONGEST_TEXT = 1 << 30
_ADVICE = {
    errno.ENOSPC: "free some space and run again",
    errno.EDQUOT: "free some of the quota and run again",
    errno.EROFS: "choose a folder that can be written",
    errno.EACCES: "allow access to it or choose another path",
    errno.EPERM: "allow access to it or choose another path",
    errno.ENOENT: "make it or choose another path",
    errno.EISDIR: "name a file",
    errno.EIO: "check the disk",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f) or choose another file",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
}
"""What to do about a failure of the file system. Where it names no path and is none of these, it
is a bug and keeps its traceback."""


class Arguments:
    """Arguments of the command line that are not flags."""

    def __init__(self, usage: str) -> None:
        self.usage = usage
        self.value: list[str] = []


_arguments: Arguments | None = None
_leave: Callable[[int], NoReturn] = sys.exit


def define_arguments(usage: str) -> Arguments:
    """Lets this script take arguments besides its flags, shown as `usage` in ``--help``.

    Read `Arguments.value` inside ``main``. A script without this refuses such arguments.
    """
    global _arguments  # noqa: PLW0603 - like absl's flags: a process has one command line
    _arguments = Arguments(usage)
    return _arguments


def define_checkpoint_flag() -> flags.FlagHolder[str]:
    """Lets this script take ``--checkpoint``: what `load_model` takes by that name."""
    holder = flags.DEFINE_string(
        "checkpoint",
        "best",
        "best (lowest validation loss; the newest where losses cannot be compared), newest, or a "
        "step.",
    )
    flags.register_validator(
        holder,
        lambda value: value in ("best", "newest") or (value.isascii() and value.isdecimal()),
        "must be best, newest or a step",
    )
    _show_in_help(holder)
    return holder


def define_corpus_flags() -> tuple[flags.FlagHolder[str], flags.FlagHolder[str]]:
    """Lets this script take ``--cache_dir`` and ``--source``: see `open_saved_corpus`."""
    cache_dir = flags.DEFINE_string(
        "cache_dir", "", "Folder of the run's tokens, where they are not in the workdir."
    )
    source = flags.DEFINE_string(
        "source", "", "Text to make the run's tokens from again, where they were deleted."
    )
    _show_in_help(cache_dir, source)
    return cache_dir, source


def _show_in_help(*holders: flags.FlagHolder[Any]) -> None:
    """Make flags that this module defines appear in the ``--help`` of the script."""
    for holder in holders:
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[holder.name])


def read_text(text: str | None, file: str | None, *, name: str) -> str:
    """The text of a flag or of the file that another flag names.

    Args:
      text: value of ``--NAME``; None where neither flag is set gives an empty text.
      file: value of ``--NAME_file``; ``-`` is standard input.
      name: NAME.

    Raises:
      UserError: both are given, the file cannot be read, is not a regular one or larger than 1 GiB,
        or what is read is no UTF-8.
    """
    if text is not None and file is not None:
        raise UserError(f"--{name} and --{name}_file exclude each other; give one of them")
    if file is None:
        where, data = f"--{name}", (text or "").encode("utf-8", "surrogateescape")
    elif file == "-":
        where, data = "standard input", sys.stdin.buffer.read(_LONGEST_TEXT + 1)
        if len(data) > _LONGEST_TEXT:
            raise UserError(
                f"standard input: more than {_LONGEST_TEXT:,} bytes; give a shorter text"
            )
    else:
        where = file
        try:
            data = read_file(expand_path(file, f"{name}_file"), _LONGEST_TEXT)
        except OSError as error:
            raise UserError(
                f"--{name}_file={file}: {error.strerror}; name a readable file"
            ) from error
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: invalid UTF-8 at byte {error.start}; give UTF-8 text") from error


def expand_path(path: str, flag: str) -> str:
    """Return the absolute path that ``--FLAG`` names, ``~`` and ``~USER`` replaced.

    Raises:
      UserError: there is no such user, `path` holds a zero byte, or is the address of a bucket.
    """
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", path):
        raise UserError(
            f"--{flag}={path}: an address and no path; mount the bucket and name what it is "
            "mounted at, or choose a path of this machine"
        )
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise UserError(f"--{flag}={path}: no such user; write ./{path} for a name with a ~")
    if "\0" in expanded:
        raise UserError(f"--{flag}={path}: no path holds a zero byte; name another")
    return os.path.abspath(expanded)


def leave_by(leave: Callable[[int], NoReturn]) -> None:
    """Makes `run` end this process with ``leave(code)`` instead of ``sys.exit(code)``."""
    global _leave  # noqa: PLW0603 - a process ends once
    _leave = leave


def run(main: Callable[[], int | None]) -> NoReturn:
    """Parses the flags, runs `main` and exits with its code (None is 0).

    A `UserError`, a wrong flag, a failure of the file system that the user can fix, or too little
    memory is one line on stderr and code 2; Ctrl-C is code 130. Anything else is a bug and keeps
    its traceback.
    """
    try:
        try:
            _check_current_folder()
            app.run(lambda _: main(), flags_parser=_parse_flags)
        finally:
            sys.stdout.flush()
    except UserError as error:
        _fail(str(error))
    except flags.Error as error:
        _fail(f"{error}; --help shows the flags")
    except BrokenPipeError:  # the reader of a pipe has gone, as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _leave(128 + 13)
    except OSError as error:
        if error.filename is None and error.errno not in _ADVICE:
            _show_bug()
        what = (error.strerror or str(error)).lower()
        advice = _ADVICE.get(error.errno or 0, "choose another path")
        _fail(f"{_path_of(error)}: {what}; {advice}")
    except KeyboardInterrupt:
        _leave(130)
    except Exception as error:
        if _is_lack_of_memory(error):
            _fail(f"not enough memory: {error}; choose smaller sizes, or free some")
        if isinstance(error, RuntimeError) and "home directory" in str(error):  # of pathlib
            _fail("~: no such user, or one without a home directory; write whole paths")
        _show_bug()
    except SystemExit as end:
        _leave(end.code if isinstance(end.code, int) else int(end.code is not None))
    _leave(0)


def _check_current_folder() -> None:
    try:
        os.getcwd()
    except OSError as error:
        raise UserError("the current folder is gone; cd to another one and run again") from error


def _is_lack_of_memory(error: Exception) -> bool:
    is_of_jax = type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError")
    return isinstance(error, MemoryError) or (is_of_jax and "RESOURCE_EXHAUSTED" in str(error))


def _show_bug() -> NoReturn:
    traceback.print_exc()
    _leave(1)


def _fail(message: str) -> NoReturn:
    with contextlib.suppress(OSError):
        print(f"error: {one_line(message)}", file=sys.stderr, flush=True)
    _leave(EXIT_USER_ERROR)


def _path_of(error: OSError) -> str:
    if isinstance(error.filename, str | bytes):
        return os.fsdecode(error.filename) or "''"
    workdir = flags.FLAGS["workdir"].value if "workdir" in flags.FLAGS else None
    return workdir or "writing a file"  # a failed write() does not say on which file


def _parse_flags(argv: list[str]) -> list[str]:
    options = argv[1 : argv.index("--")] if "--" in argv else argv[1:]
    if {"-h", "-help", "--help"} & set(options):
        print(_help())
        sys.exit(0)
    try:
        arguments: list[str] = flags.FLAGS(argv)[1:]
    except flags.UnrecognizedFlagError as error:
        name = error.flagname
        if name.startswith("config.") and "config" in flags.FLAGS:
            raise config_is_missing() from error
        near = nearest_name(name, flags.FLAGS)
        raise UserError(f"--{name}: no such flag{near}; --help shows the flags") from error
    except SystemExit:  # the other help flags of absl, which exit with code 1
        sys.exit(0)
    if arguments and _arguments is None:
        raise UserError(f"{arguments[0]!r}: not a flag; --help shows the flags")
    if _arguments is not None:
        _arguments.value = arguments
    _show_own_logs_only()
    return argv


def _help() -> str:
    lines = [(sys.modules["__main__"].__doc__ or "").strip(), ""]
    usage = f" {_arguments.usage}" if _arguments is not None else ""
    lines += [f"usage: python {sys.argv[0]}{usage} [--flag=value ...]"]
    lines += [flags.FLAGS.main_module_help().rstrip()]
    if "config" in flags.FLAGS:
        lines += ["", "fields of --config and their defaults (a configuration file sets its own):"]
        lines += [f"  --config.{path}={default!r}" for path, default in config_fields().items()]
    return "\n".join(lines)


class _StderrHandler(logging.Handler):
    """Writes to whatever ``sys.stderr`` is now, so that lines appear above a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        print(f"{level}{self.format(record)}", file=sys.stderr, flush=True)


def _show_own_logs_only() -> None:
    """Own lines from INFO up, those of libraries from WARNING up, without absl's prefixes."""
    package = Path(__file__).resolve().parent
    folders = (str(package), str(Path(sys.argv[0]).resolve().parent))

    def is_wanted(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.WARNING or record.pathname.startswith(folders)

    handler = _StderrHandler()
    handler.addFilter(is_wanted)
    root = logging.getLogger()
    root.removeHandler(absl_logging.get_absl_handler())
    root.addHandler(handler)
