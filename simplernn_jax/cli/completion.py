"""Shell completion: a script for bash or zsh with all commands, flags and configurations.

The scripts' own flags are the source, so that a new one needs nothing here. Libraries such as
argcomplete and shtab complete parsers of argparse, not absl's flags.
"""

import runpy
import sys
from shlex import quote

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

_FUNCTION = """\
_simplernn() {{
  local command="${{COMP_WORDS[1]}}" flag="${{COMP_WORDS[COMP_CWORD - 1]}}" words=""
  local cur="${{COMP_WORDS[COMP_CWORD]}}"
  [[ $COMP_CWORD == 1 ]] && command=""
  [[ $flag == "=" ]] && flag="${{COMP_WORDS[COMP_CWORD - 2]}}" # bash splits words at =
  [[ $cur == "=" ]] && cur=""
  [[ $flag == --* && $cur != -* ]] || flag=""
  case "$command $flag" in
{cases}
  esac
  COMPREPLY=($(compgen -W "$words" -- "$cur"))
}}
complete -o default -F _simplernn simplernn
"""
"""Where no word fits, the shell completes file names."""

_SAME_FLAGS = {"launch_local": "train"}
"""Commands that pass their flags on to another."""


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
    words = {" ": [*commands, "completion"], "completion ": list(SHELLS)}
    for name in commands:
        words |= _words_of(name)
    cases = "\n".join(f"    {quote(key)}) words={quote(' '.join(words[key]))} ;;" for key in words)
    return SHELLS[shell] + _FUNCTION.format(cases=cases)


def _words_of(command: str) -> dict[str, list[str]]:
    """Return the words that may follow ``COMMAND`` and ``COMMAND --FLAG``.

    They are from the flags that the script defines, which are removed again from absl's.
    """
    path = ROOT / "scripts" / f"{_SAME_FLAGS.get(command, command)}.py"
    known = set(flags.FLAGS)
    sys.path.insert(0, str(path.parent))
    try:
        module = runpy.run_path(str(path), run_name=f"simplernn_script_{command}")
    finally:
        sys.path.remove(str(path.parent))
    names, words = ["--help"], {}
    for name in [name for name in flags.FLAGS if name not in known]:
        flag = flags.FLAGS[name]
        names += [f"--{name}", f"--no{name}"] if flag.flag_type() == "bool" else [f"--{name}"]
        if flag.flag_type() == "string enum":
            words[f"{command} --{name}"] = list(flag.parser.enum_values)
        elif flag.flag_type() != "bool":
            words[f"{command} --{name}"] = config_names() if name == "config" else []
        delattr(flags.FLAGS, name)
    usages = [value.usage for value in module.values() if isinstance(value, Arguments)]
    arguments = " ".join(usages).replace("|", " ").split()
    return words | {f"{command} ": names + [word for word in arguments if word.islower()]}
