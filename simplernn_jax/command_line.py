"""What every script shares: flags, one-line errors, quiet logs.

A script defines its flags at module level and ends with ``command_line.run(main)``:

    _CONFIG = command_line.define_config_flag()

    def main() -> int | None:
        config = _CONFIG.value

    if __name__ == "__main__":
        command_line.run(main)
"""

import errno
import logging
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from absl import app, flags
from absl import logging as absl_logging

from simplernn_jax.config import nearest_name
from simplernn_jax.config_flag import config_fields, config_is_missing, define_config_flag
from simplernn_jax.errors import UserError

__all__ = [
    "EXIT_INTERRUPTED",
    "Arguments",
    "define_arguments",
    "define_checkpoint_flag",
    "define_config_flag",
    "define_corpus_flags",
    "read_text",
    "run",
]

EXIT_INTERRUPTED = 75
"""A run stopped by SIGTERM or SIGINT after saving; the same command goes on (EX_TEMPFAIL)."""

_EXIT_USER_ERROR = 2
_ADVICE = {
    errno.ENOSPC: "free some space and run again",
    errno.EDQUOT: "free some of the quota and run again",
    errno.EROFS: "choose a folder that can be written",
    errno.EACCES: "allow access to it or choose another path",
    errno.EPERM: "allow access to it or choose another path",
    errno.EEXIST: "choose another path",
    errno.ENOTDIR: "choose another path",
    errno.EISDIR: "name a file",
}
"""Failures of the file system that a user can mend; any other OSError is a bug and stays one."""


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
    return holder


def define_corpus_flags() -> tuple[flags.FlagHolder[str], flags.FlagHolder[str]]:
    """Lets this script take ``--cache_dir`` and ``--source``: see `open_saved_corpus`."""
    cache_dir = flags.DEFINE_string(
        "cache_dir", "", "Folder of the run's tokens, where they are not in the workdir."
    )
    source = flags.DEFINE_string(
        "source", "", "Text to make the run's tokens from again, where they were deleted."
    )
    return cache_dir, source


def read_text(text: str | None, file: str | None, *, name: str) -> str:
    """The text of a flag or of the file that another flag names.

    Args:
      text: value of ``--NAME``; None where neither flag is set gives an empty text.
      file: value of ``--NAME_file``; ``-`` is standard input.
      name: NAME.

    Raises:
      UserError: both are given, the file cannot be read, or what is read is no UTF-8.
    """
    if text is not None and file is not None:
        raise UserError(f"--{name} and --{name}_file exclude each other; give one of them")
    if file is None:
        where, data = f"--{name}", (text or "").encode("utf-8", "surrogateescape")
    elif file == "-":
        where, data = "standard input", sys.stdin.buffer.read()
    else:
        where, path = file, Path(file).expanduser()
        try:
            data = path.read_bytes()
        except OSError as error:
            raise UserError(
                f"--{name}_file={path}: {error.strerror}; name a readable file"
            ) from error
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: invalid UTF-8 at byte {error.start}; give UTF-8 text") from error


def leave_by(leave: Callable[[int], NoReturn]) -> None:
    """Makes `run` end this process with ``leave(code)`` instead of ``sys.exit(code)``."""
    global _leave  # noqa: PLW0603 - a process ends once
    _leave = leave


def run(main: Callable[[], int | None]) -> NoReturn:
    """Parses the flags, runs `main` and exits with its code (None is 0).

    A `UserError`, a wrong flag or a failure of the file system that the user can mend is one
    line on stderr and code 2; Ctrl-C is code 130. Anything else is a bug and keeps its traceback.
    """
    try:
        try:
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
        if error.errno not in _ADVICE:
            traceback.print_exc()
            _leave(1)
        _fail(f"{_path_of(error)}: {os.strerror(error.errno).lower()}; {_ADVICE[error.errno]}")
    except KeyboardInterrupt:
        _leave(130)
    except Exception:
        traceback.print_exc()
        _leave(1)
    except SystemExit as end:
        _leave(end.code if isinstance(end.code, int) else int(end.code is not None))
    _leave(0)


def _fail(message: str) -> NoReturn:
    line = " ".join(part.strip() for part in message.splitlines())
    print(f"error: {line}", file=sys.stderr)
    _leave(_EXIT_USER_ERROR)


def _path_of(error: OSError) -> str:
    if error.filename is not None:
        return os.fsdecode(error.filename)
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
