"""The command ``simplernn``, which is also ``python -m simplernn_jax``.

``simplernn train ...`` replaces itself by ``python scripts/train.py ...``, so that both are the
same program. Standard library only: nothing slow is imported before the command is known.
"""

import os
import signal
import sys

from simplernn_jax import __version__, project
from simplernn_jax.errors import EXIT_USER_ERROR, nearest_name, one_line


def commands() -> dict[str, str]:
    """Return the commands, which are the installed scripts, with their docstrings' first lines."""
    texts = {
        file.stem: file.read_text(encoding="utf-8")
        for file in sorted((project.ROOT / "scripts").glob("*.py"))
        if file.stem not in ("bootstrap", "stress")
    }
    return {name: text.removeprefix('"""').partition("\n")[0] for name, text in texts.items()}


def main() -> int:
    """Run the command that the first argument names; return an exit code unless it is a script."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "-help", "--help"):
        print(_help())
        return 0
    if name == "--version":
        print(__version__)
        return 0
    if name not in commands():
        near = nearest_name(name, commands())
        message = one_line(f"{name!r}: no such command{near}; simplernn --help lists them")
        print(f"error: {message}", file=sys.stderr)
        return EXIT_USER_ERROR
    script = project.ROOT / "scripts" / f"{name}.py"
    # Signals wait until the script handles them, and its messages name this command.
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    os.environ[project.COMMAND] = str(os.getpid())
    os.execv(sys.executable, [sys.executable, str(script), *arguments])


def _help() -> str:
    lines = commands()
    width = max(map(len, lines))
    listed = "\n".join(f"  {name:<{width}}  {line}" for name, line in lines.items())
    return (
        f"usage: simplernn COMMAND [--flag=value ...]\n\n{listed}\n\n"
        "simplernn COMMAND --help describes a command and its flags; --version shows the version."
    )


if __name__ == "__main__":
    sys.exit(main())
