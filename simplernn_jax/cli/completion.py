"""Shell completion: a script for bash or zsh with all commands, flags and configurations.

The scripts' own flags are the source, so that a new one needs nothing here. Libraries such as
argcomplete and shtab complete parsers of argparse, not absl's flags.
"""

import importlib.util
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from shlex import quote
from typing import NamedTuple

from absl import flags

from simplernn_jax.cli.command_line import Arguments
from simplernn_jax.cli.config_files import config_names
from simplernn_jax.errors import UserError
from simplernn_jax.project import ROOT

_ZSH = """\
(( $+functions[compdef] )) || { autoload -U +X compinit && compinit; }
autoload -U +X bashcompinit && bashcompinit
"""
SHELLS = {"bash": "", "zsh": _ZSH}
"""Shells, and what their scripts begin with."""

_SAME_FLAGS = {"launch_local": "train"}
"""Commands that pass their flags on to another."""


class _Flags(NamedTuple):
    """Flags of a command with their choices (None: file names), and words that are no flags."""

    choices: dict[str, list[str] | None]
    words: list[str]


def completion_script(shell: str, commands: list[str]) -> str:
    """Return the completion script of the command ``simplernn``.

    Args:
      shell: bash or zsh.
      commands: names of its scripts.

    Raises:
      UserError: another shell.
    """
    if shell not in SHELLS:
        raise UserError(f"{shell!r}: no such shell; run: simplernn completion bash, or zsh")
    tables = {name: _flags_of(_SAME_FLAGS.get(name, name)) for name in commands}
    tables["completion"] = _Flags({}, list(SHELLS))
    configs = config_names()
    lines = [
        *(
            "_simplernn_tables() {",
            f"  commands={_quoted(tables)}",
            f"  configs={_quoted(configs)}",
        ),
        *("  case $1 in", *map(_case, tables, tables.values()), "  esac"),
        *('  case "$1 $2" in', *(line for name in tables for line in _choices(name, tables[name]))),
        *("  esac", "}"),
    ]
    function = Path(__file__).with_suffix(".bash").read_text(encoding="utf-8")
    return SHELLS[shell] + "\n".join(lines) + "\n" + function


def _case(name: str, of: _Flags) -> str:
    files = [flag for flag, choices in of.choices.items() if choices is None]
    return (
        f"    {name}) flags={_quoted(of.choices)} file_flags={_quoted(files)} "
        f"words={_quoted(of.words)} ;;"
    )


def _choices(name: str, of: _Flags) -> Iterator[str]:
    for flag, choices in of.choices.items():
        if choices:
            yield f"    {quote(f'{name} {flag}')}) choices={_quoted(choices)} ;;"


def _quoted(words: Iterable[str]) -> str:
    return quote(" ".join(words))


def _flags_of(name: str) -> _Flags:
    """Read the flags that a script defines; they are removed again from absl's."""
    path = ROOT / "scripts" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"simplernn_script_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    known = set(flags.FLAGS)
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    found = _Flags({"--help": []}, [])
    for name in [name for name in flags.FLAGS if name not in known]:
        flag = flags.FLAGS[name]
        found.choices.update(_of_type(f"--{name}", flag.flag_type(), flag))
        delattr(flags.FLAGS, name)
    for value in vars(module).values():
        if isinstance(value, Arguments):
            found.words.extend(
                word for word in value.usage.replace("|", " ").split() if word.islower()
            )
    return found


def _of_type(name: str, kind: str, flag: flags.Flag) -> dict[str, list[str] | None]:
    if kind == "bool":
        return {name: [], name.replace("--", "--no", 1): []}
    if kind == "string enum":
        return {name: list(flag.parser.enum_values)}
    return {name: None if kind == "string" else []}
