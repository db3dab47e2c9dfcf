"""Python processes started by tests."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Result(NamedTuple):
    """Exit code and decoded streams of a process that ended."""

    code: int
    output: str
    errors: str


def run_python(*arguments, stdin=b"", timeout=300, cwd=ROOT, **environment):
    """Run ``python ARGUMENTS`` on the CPU."""
    # An editable install leaves the name of its path hook in sys.path, which is not a folder.
    path = os.pathsep.join([str(ROOT), *filter(os.path.isabs, sys.path)])
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        check=False,
        input=stdin,
        capture_output=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu", **environment},
        timeout=timeout,
    )
    return Result(done.returncode, done.stdout.decode("utf-8"), done.stderr.decode("utf-8"))


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
