"""A server of an untrained model in a process of its own."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request

from processes import ROOT


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
    """Start a server on a free port and wait until it is ready."""
    path = os.pathsep.join([str(ROOT), *filter(os.path.isabs, sys.path)])
    process = subprocess.Popen(
        [sys.executable, "scripts/serve.py", f"--workdir={workdir}", "--port=0", *flags],
        stderr=subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},
    )
    try:
        lines = []
        for line in process.stderr:
            lines.append(line.decode())
            if found := re.search(r"listening on (http\S+)", lines[-1]):
                break
        else:
            raise AssertionError("".join(lines))
        yield ServingProcess(process, found[1])
    finally:
        process.kill()
        process.communicate()
