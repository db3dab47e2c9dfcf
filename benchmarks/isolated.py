"""A function in a Python of its own: for what a process can do only once, such as its imports."""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

_MARK = "result: "


def call_isolated(
    function: Callable[..., Any], environment: Mapping[str, str] | None = None, **arguments: Any
) -> Any:
    """What `function` returns when a fresh interpreter calls it.

    Args:
      function: of a module's top level.
      environment: variables set besides those of this process.
      arguments: of the function; they and its result must survive JSON.

    Raises:
      RuntimeError: it failed there; the message ends with what it wrote on stderr.
    """
    module, name = function.__module__, function.__name__
    code = f"from {__name__} import answer; answer({module!r}, {name!r})"
    output = run_python(code, environment, json.dumps(arguments))
    return json.loads(output.rpartition(_MARK)[2])


def run_python(
    code: str, environment: Mapping[str, str] | None = None, standard_input: str = ""
) -> str:
    """Standard output of ``python -c code`` with the same import path.

    Raises:
      RuntimeError: its exit code is not 0.
    """
    path = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    result = subprocess.run(
        [sys.executable, "-c", code],
        input=standard_input,
        env={**os.environ, **path, **(environment or {})},
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode:
        raise RuntimeError(f"exit code {result.returncode} of {code!r}:\n{result.stderr}")
    return result.stdout


def answer(module: str, name: str) -> None:
    """The other side of `call_isolated`: arguments from standard input, the result on output."""
    function = getattr(importlib.import_module(module), name)
    print(_MARK + json.dumps(function(**json.load(sys.stdin))), flush=True)
