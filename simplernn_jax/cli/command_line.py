"""Command line of the scripts: shared flags, help, input texts, logs, errors and exit codes.

A script defines its flags at module level and ends with ``command_line.run(main)``. Its exit codes
are in docs/training.md.
"""

import contextlib
import difflib
import errno
import io
import logging
import math
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from absl import app, flags
from absl import logging as absl_logging

from simplernn_jax.config import Config, by_field
from simplernn_jax.errors import DISK_ADVICE, EXIT_USER_ERROR, UserError, one_line
from simplernn_jax.files import read_file
from simplernn_jax.project import PACKAGE, name_commands, usage

if TYPE_CHECKING:
    from simplernn_jax.data.token_store import TokenizedCorpus
    from simplernn_jax.data.tokenizer import Tokenizer
    from simplernn_jax.models import LanguageModel

flags.disclaim_key_flags()  # --help lists these flags under the script that defines them

_MAX_TEXT_BYTES = 1 << 30

_ADVICE = DISK_ADVICE | {errno.ENOENT: "create it", errno.EISDIR: "specify a file"}
"""Advice for a file-system error. One without a path that is not listed here is a bug and keeps its
traceback."""

_OTHER_NAMES = {
    "learning_rate": "lr",
    "max_new_tokens": "max_length max_tokens num_tokens",
    "num_samples": "n",
    "out": "o output output_dir",
    "prompt": "text",
    "source": "data dataset file text text_file",
    "steps": "iters max_iters max_steps",
    "workdir": "logdir log_dir out_dir output_dir run_dir",
}
"""What other programs call the flags and fields of this project."""


class Arguments:
    """Positional arguments, shown as `usage` in ``--help``; read `value` inside ``main``.

    A script that defines none rejects them.
    """

    defined: "Arguments | None" = None
    """Those of this process, which has one command line."""

    def __init__(self, usage: str) -> None:
        self.usage = usage
        self.value: list[str] = []
        Arguments.defined = self


def define_plugin_flag() -> None:
    """Define ``--plugin``; see `load_plugins`."""
    flags.DEFINE_multi_string(
        "plugin",
        [],
        "Python file, or importable module, that registers token mixers of your own; may be given "
        "several times.",
    )


def load_plugins() -> None:
    """Import what ``--plugin`` names; it imports JAX."""
    for plugin in flags.FLAGS.plugin:
        from simplernn_jax.models.mixers.token_mixer import load_plugin

        load_plugin(plugin)


class ModelFlags:
    """``--workdir``, ``--checkpoint``, ``--adapter``, ``--plugin``, ``--quantize``: the model."""

    def __init__(self, *, quantizes: bool = True) -> None:
        self._workdir = flags.DEFINE_string("workdir", None, "Folder of a training run.")
        define_plugin_flag()
        self._checkpoint = flags.DEFINE_string(
            "checkpoint",
            "best",
            "Checkpoint to load: best (lowest validation loss, or newest if none was evaluated), "
            "newest, or a step number.",
        )
        self._adapter = flags.DEFINE_string(
            "adapter", None, "File of low-rank updates (train.tune=lora) to merge into the model."
        )
        self._quantize = None
        if quantizes:
            self._quantize = flags.DEFINE_enum(
                "quantize",
                "none",
                ["none", "bfloat16", "int8", "int4"],
                "Store the weights for decoding in fewer bits: faster for models larger than the "
                "CPU's caches, and a little less accurate.",
            )

    @property
    def workdir(self) -> str:
        """The absolute path of ``--workdir``; raises `UserError` if there is none."""
        if not self._workdir.value:
            raise UserError("no --workdir: specify the folder of a training run, such as runs/base")
        return expand_path(self._workdir.value, "workdir")

    @property
    def checkpoint(self) -> str:
        """``best``, ``newest`` or a step, as for `simplernn_jax.load_model`."""
        return self._checkpoint.value

    def load(self) -> "tuple[LanguageModel, Tokenizer, Config]":
        """Load the model with its tokenizer and configuration, to compute with it.

        Raises:
          UserError: there is no valid model, or the devices cannot be used.
        """
        from simplernn_jax.cli.compilation_cache import use_compilation_cache
        from simplernn_jax.devices import check_devices

        workdir = self.workdir  # its error comes before the slow start of a backend
        check_devices()
        use_compilation_cache()
        load_plugins()
        return self.load_again(workdir)

    def load_again(self, workdir: str) -> "tuple[LanguageModel, Tokenizer, Config]":
        """Load the model, whose run may have new checkpoints."""
        from simplernn_jax import load_model
        from simplernn_jax.inference import quantize_model

        adapter = self._adapter.value and expand_path(self._adapter.value, "adapter")
        model, tokenizer, config = load_model(workdir, self.checkpoint, adapter=adapter)
        if self._quantize is not None:
            model = quantize_model(model, self._quantize.value)
        return model, tokenizer, config


class CorpusFlags:
    """``--cache_dir`` and ``--corpus_source``: where the text of a run is."""

    def __init__(self) -> None:
        self._cache_dir = flags.DEFINE_string(
            "cache_dir", "", "Folder of the run's tokenized corpus, if it is not in the workdir."
        )
        self._source = flags.DEFINE_string(
            "corpus_source", "", "The run's own text, to re-tokenize if its tokens are missing."
        )
        self.holders = (self._cache_dir, self._source)

    def open(self, workdir: str) -> "TokenizedCorpus":
        """Open the corpus of the run in `workdir`; raises as `open_saved_corpus`."""
        from simplernn_jax.training.preparation import open_saved_corpus

        return open_saved_corpus(
            workdir, cache_dir=self._cache_dir.value, source=self._source.value
        )


class SamplingFlags:
    """``--max_new_tokens``, ``--temperature``, ``--top_k``, ``--top_p`` and ``--seed``."""

    def __init__(self, *, max_new_tokens: int, temperature: float) -> None:
        integer = partial(flags.DEFINE_integer, lower_bound=0)
        self._max_new_tokens = integer(
            "max_new_tokens", max_new_tokens, "Maximum number of new tokens.", upper_bound=2**31 - 1
        )
        self._temperature = flags.DEFINE_float(
            "temperature",
            temperature,
            "0 is greedy decoding; higher values are more random.",
            lower_bound=0,
        )
        flags.register_validator(self._temperature, math.isfinite, "must be finite")
        self._top_k = integer("top_k", 0, "Sample from the k most probable tokens; 0 disables it.")
        self._top_p = flags.DEFINE_float(
            "top_p",
            1.0,
            "Nucleus sampling: sample from the most probable tokens that together reach this "
            "probability, in (0, 1]; 1 disables it.",
        )
        flags.register_validator(self._top_p, lambda value: 0 < value <= 1, "must be in (0, 1]")
        self._seed = integer("seed", 0, "Random seed for sampling.", upper_bound=2**32 - 1)

    @property
    def max_new_tokens(self) -> int:
        """Maximum number of new tokens."""
        return self._max_new_tokens.value

    @property
    def settings(self) -> dict[str, Any]:
        """The other arguments of `generate`."""
        holders = (self._temperature, self._top_k, self._top_p, self._seed)
        return {holder.name: holder.value for holder in holders}


def read_text(text: str | None, file: str | None, *, name: str) -> str:
    """Return the text of a flag, or of the file that another flag names.

    Args:
      text: value of ``--NAME``; if neither flag is set, the text is empty.
      file: value of ``--NAME_file``; ``-`` is standard input.
      name: NAME.

    Raises:
      UserError: both are given, or the text is not UTF-8 or exceeds 1 GiB.
      OSError: the file cannot be read, is not regular or exceeds 1 GiB.
    """
    if text is not None and file is not None:
        raise UserError(f"--{name} and --{name}_file are mutually exclusive")
    if file is None:
        path, data = f"--{name}", (text or "").encode("utf-8", "surrogateescape")
    elif file == "-":
        path, data = "standard input", sys.stdin.buffer.read(_MAX_TEXT_BYTES + 1)
    else:
        path = expand_path(file, f"{name}_file")
        data = read_file(path, _MAX_TEXT_BYTES)
    if len(data) > _MAX_TEXT_BYTES:
        raise UserError(f"{path}: more than {_MAX_TEXT_BYTES:,} bytes; use a shorter text")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: invalid UTF-8 at byte {error.start}; use UTF-8 text") from error


def expand_path(path: str, flag: str) -> str:
    """Return the absolute path that ``--FLAG`` names, ``~`` and ``~USER`` replaced.

    Raises:
      UserError: no such user, or `path` is the URL of a bucket.
    """
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", path):
        raise UserError(f"--{flag}={path}: a URL, not a path; mount the bucket or use a local path")
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise UserError(f"--{flag}={path}: no such user; use ./{path} for a name with a ~")
    return os.path.abspath(expanded)


def run(main: Callable[[], int | None]) -> NoReturn:
    """Parse the flags, run `main` and exit with its code, or as `exit_with` says on an error."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Names of files and texts may hold what its encoding cannot represent.
        sys.stdout.reconfigure(errors="backslashreplace")

    exit_with(lambda: app.run(lambda _: main(), flags_parser=_parse_flags))


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
            traceback.print_exc()
            return 1
        what = (error.strerror or str(error)).lower()
        advice = _ADVICE.get(error.errno or 0, "")
        advice = f"{advice}, or choose another path" if advice else "choose another path"
        is_named = isinstance(error.filename, str | bytes)
        path = error.filename if is_named else "writing a file"  # by a failed write()
        return _report(f"{os.fsdecode(path)}: {what}; {advice}")
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):  # by JAX
            return _report(f"not enough memory: {error}; choose smaller sizes, or free some")
        if isinstance(error, RuntimeError) and "home directory" in str(error):  # of pathlib
            return _report("~: no such user, or one without a home directory; use absolute paths")
        traceback.print_exc()
        return 1
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)


def _report(message: str) -> int:
    # The library names fields as Python does.
    message = re.sub(
        r"(?<![\w./-])config(?=\.(model|data|optimizer|train|mesh)\b)", "--config", message
    )
    with contextlib.suppress(OSError):
        print(f"error: {one_line(name_commands(message))}", file=sys.stderr, flush=True)
    return EXIT_USER_ERROR


def _parse_flags(argv: list[str]) -> list[str]:
    options = argv[1 : argv.index("--")] if "--" in argv else argv[1:]
    if {"-h", "-help", "--help"} & set(options):
        print(_help())
        sys.exit(0)
    if any(word.partition("=")[0] in ("-flagfile", "--flagfile") for word in options):
        raise UserError("--flagfile: not supported, name the flags")  # absl would read any device
    try:
        arguments: list[str] = flags.FLAGS(argv)[1:]
    except flags.UnrecognizedFlagError as error:
        near = _nearest_flag(error.flagname)
        raise UserError(
            f"--{error.flagname}: no such flag{near or ';'} --help shows the flags"
        ) from error
    except SystemExit:  # absl exits with code 1 for --helpfull and its like
        sys.exit(0)
    if Arguments.defined is not None:
        Arguments.defined.value = arguments
    elif arguments:
        raise UserError(f"{arguments[0]!r}: not a flag; --help shows the flags")
    _show_own_logs_only()
    return argv


def _nearest_flag(name: str) -> str:
    """Return ``"; did you mean '--seed'?"`` of this script's flags, or "" if none is near.

    Sections of the configuration are not compared: a field may be given without its own.
    """
    own = [flag.name for flag in flags.FLAGS.get_key_flags_for_module(sys.argv[0])]
    fields = [f"config.{field}" for field in by_field(Config())] if "config" in own else []
    known = {one.rpartition(".")[2]: f"--{one}" for one in [*fields, *own]}
    name = name.rpartition(".")[2].replace("-", "_")
    near = [one for one, others in _OTHER_NAMES.items() if one in known and name in others.split()]
    near += [one for one in known if len(name) > 2 and one.startswith(name)]
    near += difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    return f"; did you mean {known[near[0]]!r}?" if near else ""


def _help() -> str:
    lines = [name_commands((sys.modules["__main__"].__doc__ or "").strip()), ""]
    positional = f" {Arguments.defined.usage}" if Arguments.defined is not None else ""
    lines += [f"usage: {usage()}{positional} [--flag=value ...]"]
    lines += [flags.FLAGS.main_module_help().rstrip()]
    if "config" in flags.FLAGS:
        lines += ["", "fields of --config and their defaults, described in docs/configuration.md:"]
        lines += [f"  --config.{path}={default!r}" for path, default in by_field(Config()).items()]
    return "\n".join(lines)


class _StderrHandler(logging.Handler):
    """Write to the current ``sys.stderr``, so that lines appear above a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        print(f"{level}{self.format(record)}", file=sys.stderr, flush=True)


def _show_own_logs_only() -> None:
    """Show this project's lines from INFO up, others from WARNING up, without absl's prefixes.

    Orbax logs the traceback of a failed save in each of its threads, and raises the error too.
    """
    folders = (str(PACKAGE), str(Path(sys.argv[0]).resolve().parent))

    def is_wanted(record: logging.LogRecord) -> bool:
        is_raised_too = record.exc_info is not None and "/orbax/" in record.pathname
        is_own = record.pathname.startswith(folders)
        return is_own or (record.levelno >= logging.WARNING and not is_raised_too)

    handler = _StderrHandler()
    handler.addFilter(is_wanted)
    root = logging.getLogger()
    root.removeHandler(absl_logging.get_absl_handler())
    root.addHandler(handler)
