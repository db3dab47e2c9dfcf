"""Python processes started by tests."""

import atexit
import contextlib
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]


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


def start_python(
    *arguments,
    cwd=ROOT,
    text=True,
    stdin=None,
    stderr=subprocess.PIPE,
    process_group=None,
    **environment,
):
    """Start ``python ARGUMENTS`` on the CPU, with pipes for its output and errors."""
    # An editable install leaves the name of its path hook in sys.path, which is not a folder.
    path = os.pathsep.join([str(ROOT), *filter(os.path.isabs, sys.path)])
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=stderr,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu", **environment},
        text=text,
        process_group=process_group,
    )


FORKS = """
import atexit, gc, json, os, runpy, sys, tempfile, threading, traceback, warnings
import matplotlib.backends.backend_agg, matplotlib.figure, matplotlib.ticker, rich.progress
import tensorboardX.record_writer, tensorboardX.summary
import simplernn_jax.analysis, simplernn_jax.inference, simplernn_jax.training.loop

simplernn_jax.training.report.SAMPLES = 0  # as small_runs.py does
gc.freeze()  # or forks would copy the pages of all that a collection visits
for line in iter(sys.stdin.readline, ""):
    streams, folder, environment, command = json.loads(line)
    with warnings.catch_warnings(action="ignore"):  # about threads, which are idle
        child = os.fork()
    if not child:
        for descriptor, name in enumerate(streams):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), descriptor)
        os.chdir(folder)
        os.environ.update(environment)
        tempfile.tempdir = None  # or TMPDIR has no effect
        sys.argv, script = command, os.path.abspath(command[0])
        sys.path[0] = os.path.dirname(script)
        try:
            runpy.run_path(script, run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            traceback.print_exc()
            code = 1
        # What an exit does, but for the destruction of modules, which copies their pages.
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@functools.cache
def _forks():
    """The process that runs scripts in forks, to the end of these tests."""
    process = start_python("-c", FORKS, stdin=subprocess.PIPE, stderr=None)
    atexit.register(process.communicate)
    return process


def run_scripts(*commands, stdin=b"", cwd=ROOT, **environment):
    """Run ``python SCRIPT ARGUMENTS`` for each of `commands`, in a fork of one process that has
    imported what they import: most of a script's time. Variables that JAX reads when it is
    imported have no effect."""
    # A fork cannot replace itself by a process with huge pages without importing all again.
    environment["SIMPLERNN_JAX_HUGE_PAGES"] = "0"
    results = []
    for command in commands:
        with tempfile.TemporaryDirectory() as folder:
            streams = [Path(folder, name) for name in ("input", "output", "errors")]
            streams[0].write_bytes(stdin)
            request = ([*map(str, streams)], str(cwd), environment, [*map(str, command)])
            print(json.dumps(request), file=_forks().stdin, flush=True)
            code = int(_forks().stdout.readline())
            results.append(Result(code, *(path.read_text("utf-8") for path in streams[1:])))
    return results


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


class ServingProcess:
    """``scripts/serve.py`` with a base URL, and one request at a time."""

    def __init__(self, process, url):
        self.process = process
        self.url = url

    def send(self, method, path, body=None, **headers):
        """Return status, headers and body; JSON is decoded."""
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        try:
            answer = urllib.request.urlopen(request, timeout=60)
        except urllib.error.HTTPError as error:
            answer = error
        with answer:
            content = answer.read()
            if "json" in answer.headers.get("Content-Type", ""):
                content = json.loads(content)
            return answer.status, answer.headers, content

    def post(self, path="/v1/completions", **fields):
        """Open a connection that has sent a request."""
        body = json.dumps(fields).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        connection = socket.create_connection(self.url.removeprefix("http://").split(":"))
        connection.sendall(head.encode() + body)
        return connection

    def complete(self, prompt, **fields):
        """Return the body of a completion."""
        status, _, body = self.send("POST", "/v1/completions", {"prompt": prompt, **fields})
        assert status == 200, body
        return body

    def stop(self, number=signal.SIGTERM):
        """Send a signal; return exit code and standard error."""
        self.process.send_signal(number)
        _, errors = self.process.communicate(timeout=60)
        return self.process.returncode, errors.decode()


@contextlib.contextmanager
def serving(workdir, *flags):
    """Start a server of a model on a free port and wait until it is ready."""
    from benchmarks.serving import serving as serve

    with serve(workdir, *flags) as (process, url):
        yield ServingProcess(process, url)
