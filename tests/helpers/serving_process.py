"""A server of an untrained model in a process of its own."""

import contextlib
import json
import signal
import socket
import urllib.error
import urllib.request

import benchmarks.serving


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
    """Start a server on a free port and wait until it is ready."""
    with benchmarks.serving.serving(workdir, *flags) as (process, url):
        yield ServingProcess(process, url)
