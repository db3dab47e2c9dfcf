"""The flag ``--config NAME_OR_FILE`` and its overrides ``--config.section.field=value``.

`ml_collections.config_flags` makes a typed flag of every field of the configuration; this module
reports a wrong file or override in one line.
"""

import contextlib
import difflib
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from simplernn_jax.config import Config, Scalar, by_field, from_json, validate
from simplernn_jax.errors import EXIT_USER_ERROR, UserError, nearest_name
from simplernn_jax.files import importing, read_file
from simplernn_jax.project import ROOT, config_names

flags.disclaim_key_flags()  # --help lists --config under the script that defines it

_CONFIGS = ROOT / "configs"
_OTHER_NAMES = {
    "batch_size": "bs",
    "learning_rate": "lr",
    "max_new_tokens": "max_length max_tokens num_tokens",
    "num_samples": "n",
    "out": "o output output_dir",
    "prompt": "text",
    "prompt_file": "file text_file",
    "source": "data dataset file text text_file",
    "steps": "iters max_iters max_steps",
    "weight_decay": "wd",
    "workdir": "logdir model out_dir output_dir run_dir",
}
"""What other programs call the flags and fields of this project."""
_FLAG_FILE = re.compile(r"^--?flagfile[=\n](.+)", re.MULTILINE)


class ConfigFlag:
    """The configuration of this command line."""

    def __init__(self, holder: Any) -> None:
        self._holder = holder

    @property
    def value(self) -> Config:
        """Return the configuration with all overrides, validated; raises `UserError`."""
        config = self._holder.value
        if config is None:
            raise config_is_missing()
        validate(config)
        return config


def define_config_flag() -> ConfigFlag:
    """Define ``--config`` for this script; read its `ConfigFlag.value` inside ``main``."""
    try:
        check_flag_files(sys.argv[1:])
        holder = config_flags.DEFINE_config_file(
            "config",
            None,
            "Name, Python file whose get_config() returns a Config, or config.json of a run.",
            lock_config=False,
        )
    except (UserError, flags.Error) as error:  # it reads --flagfile
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    flags.FLAGS["config"].parser = _ConfigFileParser()
    return ConfigFlag(holder)


def config_is_missing() -> UserError:
    """Return the error for a command line without ``--config``."""
    return UserError("--config is missing; specify a file such as configs/base.py, or a name: base")


def check_flag_files(arguments: Iterable[str]) -> None:
    """Check what ``--flagfile`` names before absl reads it to its end.

    Raises:
      UserError: not a regular file, larger than 1 MiB, not UTF-8, or it includes another file.
    """
    for path in _FLAG_FILE.findall("\n".join(arguments)):
        try:
            text = read_file(os.path.expanduser(path.strip()), 1 << 20).decode("utf-8")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"--flagfile={path}: {reason}; specify a file of flags") from error
        if _FLAG_FILE.search(text):
            raise UserError(
                f"--flagfile={path}: includes another file; name both on the command line"
            )


class _OptionsParser(flags.ArgumentParser):
    """Parser of ``name=value,name=value``; numbers, true and false are as in JSON."""

    def parse(self, argument: Any) -> dict[str, Scalar]:
        if isinstance(argument, dict):
            return argument
        options: dict[str, Scalar] = {}
        for pair in filter(None, argument.split(",")):
            name, equals, text = pair.partition("=")
            if not equals:
                raise ValueError(f"{pair!r}: expected name=value")
            value: Any = text.strip()
            with contextlib.suppress(ValueError):
                value = json.loads(value)
            options[name.strip()] = value
        return options


config_flags.register_flag_parser_for_type(dict, _OptionsParser())


class _ConfigFileParser(flags.ArgumentParser):
    def parse(self, path: str) -> Config:
        config = load_config(_find(path))
        for override in _overrides(flags.FLAGS.read_flags_from_files(sys.argv[1:])):
            _check_field(override)
        return config


def _find(path: str) -> Path:
    """Return the file at `path`, or else the one of this project with that path or name."""
    given = Path(os.path.expanduser(path))
    if os.path.lexists(given) and not given.is_dir():
        return given
    in_project = _CONFIGS / f"{path}.py" if path.isidentifier() else ROOT / given
    return in_project if in_project.is_file() else given


def _near(path: Path) -> str:
    """Suggest an existing file in place of a missing one."""
    if str(path).isidentifier():
        names = config_names()
        return nearest_name(str(path), names) or f"; there are {', '.join(names)}"
    for folder in (path.parent, ROOT / path.parent, _CONFIGS):
        with contextlib.suppress(OSError):
            files = {file.stem: file for file in folder.glob("*.py")}
            if near := difflib.get_close_matches(path.stem, files, n=1):
                return f"; did you mean {str(files[near[0]])!r}?"
    base = _CONFIGS / "base.py"
    return f"; {base} is one" if base.is_file() else "; specify a file with get_config()"


def load_config(path: Path) -> Config:
    """Return a file's ``get_config()``, or a run's JSON; `UserError` names the line of an error."""
    try:
        content = read_file(path)  # a regular file, which the import below reads again
    except FileNotFoundError as error:
        raise UserError(f"--config={path}: no such file{_near(path)}") from error
    except OSError as error:
        raise UserError(
            f"--config={path}: {error.strerror}; specify a file such as configs/base.py"
        ) from error
    if path.suffix == ".json":
        try:
            return from_json(content.decode("utf-8", "replace"))
        except UserError as error:
            raise UserError(f"--config={path}: {error}") from error
    with importing(path, "--config", "simplernn_config") as module:
        if not hasattr(module, "get_config"):
            raise UserError(f"--config={path}: has no get_config(); define one returning a Config")
        config = module.get_config()
    if not isinstance(config, Config):
        kind = type(config).__name__
        raise UserError(f"--config={path}: get_config() returned {kind}; return a Config")
    config.model.join_mixers()  # an override is checked against the type in the file
    return config


def _overrides(argv: list[str]) -> Iterator[str]:
    for argument in argv:
        if argument == "--":
            return
        if match := re.match(r"--?(?:no)?config\.([^=]*)", argument):
            yield match[1]


def _check_field(path: str) -> None:
    fields = list(by_field(Config()))
    if path in fields:
        return
    in_section = [field for field in fields if field.startswith(f"{path}.")]
    if in_section:
        raise UserError(f"--config.{path}: a section; set one of {', '.join(in_section)}")
    hint = nearest_flag(path, fields) or "; --help shows them all"
    raise UserError(f"--config.{path}: no such field{hint}")


def nearest_flag(name: str, flags_and_fields: Iterable[str]) -> str:
    """Return ``"; did you mean '--seed'?"`` of `flags_and_fields`, or "" if none is near.

    Sections are not compared: a field may be given without its own.
    """
    known = {one.lstrip("-").rpartition(".")[2]: one for one in flags_and_fields}
    name = name.rpartition(".")[2].replace("-", "_")
    usual = [one for one, others in _OTHER_NAMES.items() if name in others.split()]
    near = [one for one in [*usual, name] if one in known]
    near += [one for one in known if len(name) > 2 and one.startswith(name)]
    near += difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    return f"; did you mean {known[near[0]]!r}?" if near else ""
