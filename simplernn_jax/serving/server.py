"""The process of the server: worker thread, event loop, signals."""

import asyncio
import contextlib
import gc
import resource
import signal
import socket
import sys
import threading
from types import FrameType

import uvicorn
from absl import logging
from starlette.types import ASGIApp

from simplernn_jax.errors import UserError
from simplernn_jax.serving.http import MAX_HEADER_BYTES, DeadlineProtocol
from simplernn_jax.serving.jobs import Event, Job
from simplernn_jax.serving.requests import RequestError
from simplernn_jax.serving.service import Service

MAX_UNSENT_BYTES = 1 << 14
"""Bytes that the system keeps for a connection beyond what it may send to the client."""
UNREAD_MILLISECONDS = 300_000
"""Time after which a connection ends whose client does not read what was sent."""


def listen(host: str, port: int) -> socket.socket:
    """Open the server's socket; raises `UserError` if the address cannot be used."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{host}:{port}: cannot listen ({reason}); use another --port") from error
    # Accepted sockets inherit this. asyncio sets it only on sockets with proto=IPPROTO_TCP, which
    # create_server leaves at 0. Without it, streams stall for 40 ms on reused connections.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if sys.platform == "linux":  # elsewhere, a client that does not read keeps its connection
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNREAD_MILLISECONDS)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, MAX_UNSENT_BYTES)
    return listener


def _allow_open_files(number: int) -> None:
    """Raise the limit on open files of this process to `number`, or as near as it may go."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY:
        number = min(number, hard)
    if soft != resource.RLIM_INFINITY and soft < number:
        resource.setrlimit(resource.RLIMIT_NOFILE, (number, hard))


class Server(uvicorn.Server):
    """Answers requests to `app`, an application of `service`, until SIGTERM or SIGINT.

    The loop of events runs in the thread that calls `answer`; programs are compiled in another one,
    while ``/health`` tells that the server is starting.
    """

    def __init__(
        self, service: Service, app: ASGIApp, *, max_connections: int, drain_timeout: float
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=DeadlineProtocol,
                h11_max_incomplete_event_size=4 * MAX_HEADER_BYTES,
                proxy_headers=False,
                limit_concurrency=max_connections + 1,  # uvicorn rejects the last one
                log_level="error",  # or each request that is not HTTP would write a line
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=int(drain_timeout) + 5,
            )
        )
        self._service, self._worker = service, service.worker
        self._max_connections = max_connections
        self._starter = threading.Thread(target=self._start, daemon=True)
        stop = self._worker.stop
        self._stopper = threading.Thread(target=stop, args=(drain_timeout,), daemon=True)
        self._failures: list[BaseException] = []
        self._reloads: list[asyncio.Task[None]] = []  # the loop itself keeps no task alive

    def answer(self, listener: socket.socket) -> None:
        """Answer requests until a signal; raises what ended the server before."""
        _allow_open_files(2 * self._max_connections)
        # uvicorn raises the signal again after a graceful end: that is no error here.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        asyncio.run(self._run(listener))
        self._starter.join()  # a process that ends while XLA compiles would crash
        if self._stopper.ident is not None:
            self._stopper.join()
        if self._failures:
            raise self._failures[0]

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Finish the running requests at the first signal."""
        if self._service.status != "draining":
            self._service.status = "draining"
            self._stopper.start()
        super().handle_exit(sig, frame)

    async def _run(self, listener: socket.socket) -> None:
        self._loop = asyncio.get_running_loop()
        self._address = listener.getsockname()[:2]
        self._starter.start()
        self._loop.add_signal_handler(signal.SIGHUP, self._begin_reload)
        await self.serve(sockets=[listener])

    def _start(self) -> None:
        """Compile all programs, then start the worker."""
        service = self._service
        try:
            for number, name in enumerate(self._worker.scheduler.compile(), 1):
                if service.status != "starting":
                    return
                _progress(f"compiling program {number}: {name}")
        except BaseException as error:
            self._fail(error)
            return
        # All that lives so far lives on: no collection need look at it, for 0.1 s each time.
        gc.collect()
        gc.freeze()
        self._worker.start(self._on_events, self._on_failure)
        if service.status == "starting":
            service.status = "ready"
        host, port = self._address
        _progress(f"listening on http://{f'[{host}]' if ':' in host else host}:{port}\n")

    def _on_events(self, events: list[tuple[Job, Event]]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(_deliver, events)

    def _on_failure(self, error: BaseException) -> None:
        self._service.status = "failed"
        self._fail(error)

    def _fail(self, error: BaseException) -> None:
        self._failures.append(error)
        self.should_exit = True

    def _begin_reload(self) -> None:
        self._reloads.append(self._loop.create_task(self._reload()))

    async def _reload(self) -> None:
        try:
            is_newer = await self._service.reload()
            _progress("a newer checkpoint is served\n" if is_newer else "no newer checkpoint\n")
        except RequestError as error:
            _progress(f"{error.message}\n")
        except Exception:
            logging.exception("the newer checkpoint cannot be used")


def _deliver(events: list[tuple[Job, Event]]) -> None:
    for job, event in events:
        if job.deliver is not None:
            job.deliver(job, event)


def _progress(line: str) -> None:
    shown = f"\r\x1b[K{line}" if sys.stderr.isatty() else f"{line.rstrip()}\n"
    print(shown, end="", file=sys.stderr, flush=True)
