"""Shell completion: a script for bash or zsh with all commands, flags and configurations.

The scripts' own flags are the source, so that a new one needs nothing here. Libraries such as
argcomplete and shtab complete parsers of argparse, not absl's flags.
"""

import runpy
import sys
from collections.abc import Iterable
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
    lines = ["_simplernn_tables() {", f"  commands={_quoted(tables)}"]
    lines += [f"  configs={_quoted(config_names())}", "  case $1 in"]
    for name, (choices, words) in tables.items():
        files = [flag for flag, values in choices.items() if values is None]
        flags_and_files = f"flags={_quoted(choices)} file_flags={_quoted(files)}"
        lines.append(f"    {name}) {flags_and_files} words={_quoted(words)} ;;")
    lines += ["  esac", '  case "$1 $2" in']
    for name, (choices, _) in tables.items():
        for flag, values in choices.items():
            if values:
                lines.append(f"    {quote(f'{name} {flag}')}) choices={_quoted(values)} ;;")
    lines += ["  esac", "}"]
    function = Path(__file__).with_suffix(".bash").read_text(encoding="utf-8")
    return SHELLS[shell] + "\n".join(lines) + "\n" + function


def _quoted(words: Iterable[str]) -> str:
    return quote(" ".join(words))


def _flags_of(name: str) -> _Flags:
    """Read the flags that a script defines; they are removed again from absl's."""
    path = ROOT / "scripts" / f"{name}.py"
    known = set(flags.FLAGS)
    sys.path.insert(0, str(path.parent))
    try:
        module = runpy.run_path(str(path), run_name=f"simplernn_script_{name}")
    finally:
        sys.path.remove(str(path.parent))
    choices: dict[str, list[str] | None] = {"--help": []}
    for flag_name in [flag_name for flag_name in flags.FLAGS if flag_name not in known]:
        flag = flags.FLAGS[flag_name]
        kind = flag.flag_type()
        choices[f"--{flag_name}"] = None if kind == "string" else []
        if kind == "bool":
            choices[f"--no{flag_name}"] = []
        elif kind == "string enum":
            choices[f"--{flag_name}"] = list(flag.parser.enum_values)
        delattr(flags.FLAGS, flag_name)
    usages = [value.usage for value in module.values() if isinstance(value, Arguments)]
    words = " ".join(usages).replace("|", " ").split()
    return _Flags(choices, [word for word in words if word.islower()])
