"""Python processes started by tests."""

import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Result(NamedTuple):
    """Exit code and decoded streams of a process that ended."""

    code: int
    output: str
    errors: str


def run_python(*arguments, stdin=b"", timeout=300, **options):
    """Run ``python ARGUMENTS`` on the CPU; `options` are those of `start_python`."""
    process = start_python(*arguments, text=False, stdin=subprocess.PIPE, **options)
    try:
        output, errors = process.communicate(stdin, timeout)
    finally:
        process.kill()
    return Result(process.returncode, output.decode("utf-8"), errors.decode("utf-8"))


def start_python(*arguments, cwd=ROOT, text=True, stdin=None, process_group=None, **environment):
    """Start ``python ARGUMENTS`` on the CPU, with pipes for its output and errors."""
    # An editable install leaves the name of its path hook in sys.path, which is not a folder.
    path = os.pathsep.join([str(ROOT), *filter(os.path.isabs, sys.path)])
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu", **environment},
        text=text,
        process_group=process_group,
    )


FORKS = """
import json, os, runpy, sys, warnings
import {imports}

folder, *commands = sys.argv[1:]
codes = []
for number, command in enumerate(map(json.loads, commands)):
    with warnings.catch_warnings(action="ignore"):  # about threads, which are idle
        child = os.fork()
    if not child:
        for descriptor, name in enumerate(("input", f"{{number}}.output", f"{{number}}.errors")):
            os.dup2(os.open(f"{{folder}}/{{name}}", os.O_RDWR | os.O_CREAT), descriptor)
        sys.argv = command
        sys.path[0] = os.path.dirname(os.path.abspath(command[0]))
        runpy.run_path(command[0], run_name="__main__")
        sys.exit()
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(codes))
"""


def run_scripts(*commands, imports="simplernn_jax.command_line", stdin=b"", **options):
    """Run ``python SCRIPT ARGUMENTS`` for each of `commands`, in a fork of one process that has
    imported `imports`: most of a script's time."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "input").write_bytes(stdin)
        texts = [json.dumps([str(word) for word in command]) for command in commands]
        # A fork cannot replace itself by a process with huge pages without importing all again.
        code, output, errors = run_python(
            *("-c", FORKS.format(imports=imports), folder, *texts),
            SIMPLERNN_JAX_HUGE_PAGES="0",
            **options,
        )
        assert code == 0, errors
        return [
            Result(
                code, *(Path(folder, f"{n}.{name}").read_text() for name in ("output", "errors"))
            )
            for n, code in enumerate(json.loads(output))
        ]


def assert_each_refused(script, *cases, **options):
    """`assert_refused` of ``python SCRIPT ARGUMENTS`` for each case ``([ARGUMENTS], *parts)``."""
    results = run_scripts(*((script, *arguments) for arguments, *_ in cases), **options)
    for result, (_, *parts) in zip(results, cases, strict=True):
        assert_refused(result, *parts)


def assert_refused(result, *parts):
    """Exit code 2, no output, and one line of error with all of `parts`."""
    assert (result.code, result.output) == (2, "")
    assert result.errors.startswith("error: ")
    assert result.errors.count("\n") == 1
    for part in parts:
        assert part in result.errors


def free_address():
    """HOST:PORT of this machine at which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"
