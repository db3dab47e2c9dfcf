"""Rendering of chat templates in a separate process, under limits of the operating system."""

import atexit
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from simplernn_jax.errors import one_line

Message = dict[str, str]
"""``role`` and ``content``, as in OpenAI's API."""

_PROGRAM = str(Path(__file__).with_name("template_worker.py"))
_MAX_ANSWER, _EXPANSION = 1 << 24, 16
"""Bytes of an answer, and further ones for each byte of the request."""
_WALL_SECONDS = 30.0
"""Wait for an answer: far more than CPU time, for a machine that is busy."""


class TemplateError(Exception):
    """Reason why messages cannot be rendered."""


class TemplateProcess:
    """A process that renders templates; started when needed, and again after it was killed.

    Thread-safe. It ends with this process: it then reads the end of its input.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Leave the process, if there is one, to the parent of a fork."""
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def render(
        self, source: str, renderings: Sequence[tuple[Sequence[Message], bool]]
    ) -> list[str]:
        """Render messages by the template `source`, with a generation prompt where True is given.

        Raises:
          TemplateError: one of them cannot be rendered, or exceeds a limit.
        """
        request = json.dumps([source, renderings], ensure_ascii=False)
        with self._lock:
            try:
                if self._process is None or self._process.poll() is not None:
                    self.close()
                    self._start()
                answer = self._exchange(request.encode("utf-8", "surrogatepass"))
            except BaseException as error:  # an interrupt, too, leaves half an answer
                code = self.close()
                if isinstance(error, (OSError, ValueError)):
                    raise TemplateError(_reason(error, code)) from error
                raise
        if "error" in answer:
            raise TemplateError(one_line(answer["error"]))
        return answer["texts"]

    def close(self) -> int | None:
        """End the process; return its exit code, or None if there is none."""
        if self._process is None:
            return None
        with self._socket, self._answers, self._process as process:
            self._process = None
            process.kill()
        return process.returncode

    def _exchange(self, request: bytes) -> dict[str, Any]:
        self._socket.sendall(b"%d\n%b" % (len(request), request))
        size = int(self._answers.readline(20))
        if size > _MAX_ANSWER + _EXPANSION * len(request):
            raise TemplateError("it renders too much text")
        return json.loads(self._answers.read(size))

    def _start(self) -> None:
        self._socket, theirs = socket.socketpair()
        self._socket.settimeout(_WALL_SECONDS)
        self._answers = self._socket.makefile("rb")
        with theirs:
            self._process = subprocess.Popen(
                # -P and -S: neither the folder of the program nor hooks of packages are used.
                [sys.executable, "-P", "-S", _PROGRAM],
                stdin=theirs.fileno(),
                stdout=theirs.fileno(),
                stderr=subprocess.DEVNULL,
                cwd="/",
                env={
                    "PYTHONPATH": os.pathsep.join(filter(os.path.isabs, sys.path)),
                    "LD_LIBRARY_PATH": os.environ.get("LD_LIBRARY_PATH", ""),
                },
                start_new_session=True,  # Ctrl-C is for the parent
            )


def _reason(error: OSError | ValueError, code: int | None) -> str:
    if code is None:
        return f"no process can be started for it ({error})"
    if isinstance(error, TimeoutError):
        return f"it takes more than {_WALL_SECONDS:g} s"
    if code == -signal.SIGPROF:
        return "it takes more than 1 s of CPU time"
    return f"the process that renders it has ended (exit code {code})"


PROCESS = TemplateProcess()
atexit.register(PROCESS.close)
os.register_at_fork(after_in_child=PROCESS.forget)
