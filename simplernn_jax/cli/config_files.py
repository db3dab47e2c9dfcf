"""Configurations of the command line: ``--config NAME_OR_FILE`` and a flag for every field.

A file is Python with ``get_config()``, or the JSON that a run saved.
"""

import contextlib
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from absl import flags

from simplernn_jax.config import (
    SET_BY_MINUTES,
    Config,
    Scalar,
    by_field,
    from_json,
    types_of,
    validate,
)
from simplernn_jax.errors import UserError, nearest_name
from simplernn_jax.files import importing, read_file
from simplernn_jax.project import ROOT

flags.disclaim_key_flags()  # --help lists --config under the script that defines it

_CONFIGS = ROOT / "configs"


def config_names() -> list[str]:
    """List the names of this project's configurations."""
    return sorted(file.stem for file in _CONFIGS.glob("*.py"))


def load_config(name_or_path: str | os.PathLike[str]) -> Config:
    """Load a configuration by its path, or one of this project by its name, such as ``base``.

    Raises:
      UserError: no such file, it returns no `Config`, or it has an error, whose line is named.
    """
    given = os.fspath(name_or_path)
    path = _find(given)
    if not path.is_file():
        names = config_names()
        near = nearest_name(path.stem, names) or f"; there are {', '.join(names)}"
        raise UserError(f"--config={given}: no such file{near}")
    if path.suffix == ".json":
        try:
            return from_json(read_file(path).decode("utf-8", "replace"))
        except UserError as error:
            raise UserError(f"--config={given}: {error}") from error
    with importing(path, "--config", "simplernn_config") as module:
        if not hasattr(module, "get_config"):
            raise UserError(f"--config={given}: has no get_config(); define one returning a Config")
        config = module.get_config()
    if not isinstance(config, Config):
        kind = type(config).__name__
        raise UserError(f"--config={given}: get_config() returned {kind}; return a Config")
    return config


def _find(path: str) -> Path:
    """Return the file at `path`, or else the one of this project with that path or name."""
    given = Path(os.path.expanduser(path))
    if os.path.lexists(given) and not given.is_dir():
        return given
    in_project = _CONFIGS / f"{path}.py" if path.isidentifier() else ROOT / given
    return in_project if in_project.is_file() else given


class _OptionsParser(flags.ArgumentParser):
    """Parser of ``name=value,name=value``; numbers, true and false are as in JSON."""

    def parse(self, argument: str) -> dict[str, Scalar]:
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


_PARSERS: dict[type, type[flags.ArgumentParser]] = {
    bool: flags.BooleanParser,
    int: flags.IntegerParser,
    float: flags.FloatParser,
    str: flags.ArgumentParser,
    dict: _OptionsParser,
}


class _OrNone(flags.ArgumentParser):
    """Parse ``none``, or what another parser does."""

    def __init__(self, parser: flags.ArgumentParser) -> None:
        self._parser = parser

    def parse(self, argument: str) -> Any:
        return None if argument.lower() == "none" else self._parser.parse(argument)

    def flag_type(self) -> str:
        return self._parser.flag_type()


def define_config_flag() -> None:
    """Define ``--config`` and its overrides for this script; see `read_config`."""
    flags.DEFINE_string(
        "config",
        None,
        "Name, Python file whose get_config() returns a Config, or config.json of a run.",
    )
    config = Config()
    for section in dataclasses.fields(config):
        for field in dataclasses.fields(getattr(config, section.name)):
            kind, *none = types_of(field)
            parser = _PARSERS[kind]()
            name = f"config.{section.name}.{field.name}"
            flag = flags.Flag(_OrNone(parser) if none else parser, None, name, None, "")
            flag.boolean = kind is bool
            flags.DEFINE_flag(flag, module_name=__name__)


def read_config(default: str | Config = "") -> Config:
    """Return the configuration of the command line, with all overrides, validated.

    Args:
      default: configuration, or the file to load, in place of ``--config``.

    Raises:
      UserError: there is none, or it is invalid.
    """
    path = default or flags.FLAGS["config"].value
    for name in SET_BY_MINUTES if flags.FLAGS["config.train.minutes"].value else ():
        if flags.FLAGS[f"config.{name}"].value:
            raise UserError(f"--config.{name}: follows from --minutes; omit one of the two")
    if not path:
        raise UserError(
            "--config is missing; specify a file such as configs/base.py, or a name: base"
        )
    config = path if isinstance(path, Config) else load_config(path)
    for name in by_field(config):
        flag = flags.FLAGS[f"config.{name}"]
        if flag.present:
            section, _, field = name.partition(".")
            setattr(getattr(config, section), field, flag.value)
    validate(config)
    return config
