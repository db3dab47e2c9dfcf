"""The flag ``--config NAME_OR_FILE``, and one for every field: ``--config.section.field=value``."""

import contextlib
import dataclasses
import json
from typing import Any

from absl import flags

from simplernn_jax.cli.config_files import load_config
from simplernn_jax.config import Config, Scalar, by_field, types_of, validate
from simplernn_jax.errors import UserError

flags.disclaim_key_flags()  # --help lists --config under the script that defines it


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


def read_config(default: str = "") -> Config:
    """Return the configuration of the command line, with all overrides, validated.

    Args:
      default: file to load if there is no ``--config``.

    Raises:
      UserError: there is none, or it is invalid.
    """
    path = flags.FLAGS["config"].value or default
    if not path:
        raise UserError(
            "--config is missing; specify a file such as configs/base.py, or a name: base"
        )
    config = load_config(path)
    for name in by_field(config):
        flag = flags.FLAGS[f"config.{name}"]
        if flag.present:
            section, _, field = name.partition(".")
            setattr(getattr(config, section), field, flag.value)
    validate(config)
    return config
