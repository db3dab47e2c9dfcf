"""The command ``simplernn``, which is also ``python -m simplernn_jax``.

``simplernn train ...`` replaces itself by ``python scripts/train.py ...``, so that both are the
same program. Standard library only: nothing slow is imported before the command is known.
"""

import os
import signal
import sys
from typing import NoReturn

from simplernn_jax import __version__, project
from simplernn_jax.errors import EXIT_USER_ERROR, UserError, nearest_name, one_line

COMMANDS = {
    "train": "train a model, or resume training",
    "sample": "generate text with a trained model",
    "evaluate": "score a model on held-out text",
    "chat": "talk to a chat model in the terminal",
    "serve": "serve a model over an OpenAI-compatible HTTP API",
    "explain": "visualize how a model processes a text",
    "compare": "compare runs: configurations, losses, speed",
    "export": "export a model to other formats",
    "benchmark": "measure speed and memory",
    "build_tfds": "build a TFDS dataset from text files",
    "train_tokenizer": "train a tokenizer on the text of a configuration",
    "make_conversations": "write conversations for the configuration chat",
    "launch_local": "train in several processes on this machine",
}
"""Commands that are scripts; `benchmark` only in a checkout."""


def main() -> int:
    """Run the command that the first argument names; return an exit code unless it is a script."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "-help", "--help"):
        print(_help())
        return 0
    if name == "--version":
        print(__version__)
        return 0
    if name == "completion":
        _print_completion(arguments)
    if name not in COMMANDS:
        near = nearest_name(name, [*COMMANDS, "completion"])
        return _reject(f"{name!r}: no such command{near}; simplernn --help lists them")
    script = project.ROOT / "scripts" / f"{name}.py"
    if not script.is_file():
        return _reject(f"{name}: only in a checkout of simplernn_jax; run scripts/{name}.py there")
    # Signals wait until the script handles them, and its messages name this command.
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    os.environ[project.COMMAND] = str(os.getpid())
    os.execv(sys.executable, [sys.executable, str(script), *arguments])


def _print_completion(arguments: list[str]) -> NoReturn:
    from simplernn_jax.cli.completion import completion_script
    from simplernn_jax.cli.exit_codes import exit_with

    def show() -> None:
        if len(arguments) != 1:
            raise UserError("name your shell: simplernn completion bash, or zsh")
        print(completion_script(arguments[0], list(_available())), end="")

    exit_with(show)


def _available() -> dict[str, str]:
    """Return the commands whose scripts are installed."""
    scripts = project.ROOT / "scripts"
    return {name: line for name, line in COMMANDS.items() if (scripts / f"{name}.py").is_file()}


def _help() -> str:
    lines = _available() | {"completion": "print a completion script for bash or zsh"}
    width = max(map(len, lines))
    listed = "\n".join(f"  {name:<{width}}  {line}" for name, line in lines.items())
    return (
        f"usage: simplernn COMMAND [--flag=value ...]\n\n{listed}\n\n"
        "simplernn COMMAND --help describes a command and its flags; --version shows the version."
    )


def _reject(message: str) -> int:
    print(f"error: {one_line(message)}", file=sys.stderr)
    return EXIT_USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
