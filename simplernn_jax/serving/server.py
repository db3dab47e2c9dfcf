"""The process of the server: event loop, worker thread, signals."""

import asyncio
import contextlib
import gc
import resource
import signal
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType

import uvicorn
from absl import logging
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from simplernn_jax.errors import UserError
from simplernn_jax.serving.jobs import Event, Job
from simplernn_jax.serving.requests import RequestError
from simplernn_jax.serving.service import Service
from simplernn_jax.serving.states import load_cache, save_cache

MAX_HEADER_BYTES = 1 << 15
HEADER_SECONDS = 10.0
"""Seconds within which the headers of a request must arrive, once a connection is open or its next
request has begun."""
UNREAD_SECONDS = 300
"""Seconds after which a connection ends, on Linux, whose client takes nothing."""
MAX_UNSENT_BYTES = 1 << 14
"""Bytes that the system keeps for a connection beyond what it may send to the client."""


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
    if sys.platform == "linux":
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * UNREAD_SECONDS)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, MAX_UNSENT_BYTES)
    return listener


class DeadlineProtocol(H11Protocol):
    """A connection that is closed if the headers of a request do not arrive in time."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the deadline of the first request."""
        super().connection_made(transport)
        self._deadline = self.loop.call_later(HEADER_SECONDS, transport.abort)

    def data_received(self, data: bytes) -> None:
        """Start the deadline of a next request with its first byte, and end it with its headers."""
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._deadline.cancel()
        elif self._deadline.cancelled():
            self._deadline = self.loop.call_later(HEADER_SECONDS, self.transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the deadline."""
        self._deadline.cancel()
        super().connection_lost(exc)


class Server(uvicorn.Server):
    """Answers requests to `app`, an application of `service`, until SIGTERM or SIGINT.

    The event loop runs in the thread that calls `answer`. Another thread compiles all programs,
    while ``/health`` tells that the server is starting, and then computes. `cache_folder`, if any,
    keeps the prefix cache from one process to the next.
    """

    def __init__(
        self,
        service: Service,
        app: ASGIApp,
        max_connections: int,
        drain_timeout: float,
        cache_folder: Path | None = None,
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=DeadlineProtocol,
                h11_max_incomplete_event_size=MAX_HEADER_BYTES,
                proxy_headers=False,
                limit_concurrency=max_connections + 1,  # uvicorn rejects the last one
                log_level="error",  # or each request that is not HTTP would write a line
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=int(drain_timeout) + 5,
            )
        )
        self._service, self._worker = service, service.worker
        self._drain_timeout, self._cache_folder = drain_timeout, cache_folder

    def answer(self, listener: socket.socket) -> None:
        """Answer requests until a signal; raises what ended the worker before."""
        _, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
        with contextlib.suppress(ValueError):  # macOS allows fewer than it says
            resource.setrlimit(resource.RLIMIT_NOFILE, (most_files, most_files))
        # uvicorn raises the signal again after a graceful end: that is no error here.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        asyncio.run(self._run(listener))

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Finish the running requests at the first signal."""
        if self._service.status != "draining":
            self._service.status = "draining"
            self._worker.stop(self._drain_timeout)
        super().handle_exit(sig, frame)

    async def _run(self, listener: socket.socket) -> None:
        self._loop = asyncio.get_running_loop()
        worker = self._loop.run_in_executor(
            ThreadPoolExecutor(1, "worker"), self._work, *listener.getsockname()[:2]
        )
        self._loop.add_signal_handler(signal.SIGHUP, self._begin_reload)
        try:
            await self.serve(sockets=[listener])
        finally:
            self._worker.stop(0)
        await worker  # a process that ends while XLA compiles would crash

    def _work(self, host: str, port: int) -> None:
        """Compile all programs, then compute until the worker has stopped."""
        service = self._service
        try:
            for number, name in enumerate(self._worker.scheduler.compile(), 1):
                if service.status != "starting":
                    return
                logging.info("compiling program %d: %s", number, name)
            if self._cache_folder is not None:
                load_cache(self._cache_folder, self._worker.scheduler, service.tokenizer)
            # All that lives so far lives on: no collection need look at it, for 0.1 s each time.
            gc.collect()
            gc.freeze()
            if service.status == "starting":
                service.status = "ready"
            logging.info("listening on http://%s:%d", f"[{host}]" if ":" in host else host, port)
            self._worker.run(lambda events: self._loop.call_soon_threadsafe(_deliver, events))
            if self._cache_folder is not None:
                save_cache(self._cache_folder, self._worker.scheduler, service.tokenizer)
        except BaseException:
            service.status = "failed"
            self.should_exit = True
            raise

    def _begin_reload(self) -> None:
        self._reloading = self._loop.create_task(self._reload())  # the loop keeps no task alive

    async def _reload(self) -> None:
        try:
            is_newer = await self._service.reload()
            logging.info("a newer checkpoint is served" if is_newer else "no newer checkpoint")
        except RequestError as error:
            logging.warning("%s", error.message)
        except Exception:
            logging.exception("the newer checkpoint cannot be used")


def _deliver(events: list[tuple[Job, Event]]) -> None:
    for job, event in events:
        if job.deliver is not None:
            job.deliver(job, event)
