"""The process of the server: engine thread, event loop, signals."""

import asyncio
import contextlib
import gc
import resource
import signal
import socket
import sys
import threading
from collections.abc import Callable
from typing import Any

import uvicorn
from absl import logging
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from simplernn_jax.data.chat_template import ChatTemplate
from simplernn_jax.data.tokenizer import Tokenizer
from simplernn_jax.errors import UserError
from simplernn_jax.models import LanguageModel
from simplernn_jax.serving.app import make_app
from simplernn_jax.serving.connections import MAX_HEADER_BYTES, DeadlineProtocol, Gate
from simplernn_jax.serving.engine import Engine
from simplernn_jax.serving.jobs import Event, Job
from simplernn_jax.serving.requests import RequestError
from simplernn_jax.serving.service import Reload, Service
from simplernn_jax.serving.states import StateFolder

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


def serve(
    model: LanguageModel,
    tokenizer: Tokenizer,
    listener: socket.socket,
    *,
    model_name: str,
    num_slots: int,
    cache_bytes: int,
    max_waiting: int,
    drain_timeout: float,
    states: StateFolder,
    template: ChatTemplate | None,
    api_key: bytes | None,
    allow_origin: str | None,
    hosts: frozenset[str] | None,
    max_connections: int,
    reload_model: Callable[[], Reload | None],
) -> None:
    """Answer requests until SIGTERM or SIGINT."""
    _allow_open_files(2 * max_connections)
    loop: asyncio.AbstractEventLoop | None = None

    def on_events(events: list[tuple[Job, Event]]) -> None:
        assert loop is not None
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(route, events)

    def route(events: list[tuple[Job, Event]]) -> None:
        for job, event in events:
            if job.deliver is not None:
                job.deliver(job, event)

    def on_failure(error: BaseException) -> None:
        service.status = "failed"
        fail(error)

    def fail(error: BaseException) -> None:
        failures.append(error)
        server.should_exit = True

    engine = Engine(
        model,
        num_slots=num_slots,
        cache_bytes=cache_bytes,
        max_waiting=max_waiting,
        on_events=on_events,
        on_failure=on_failure,
    )
    service = Service(
        engine, tokenizer, model.config.vocab_size, model_name, states, template, reload_model
    )

    def start() -> None:
        try:
            for number, name in enumerate(engine.decoder.compile(), 1):
                if service.status != "starting":
                    return
                _progress(f"compiling program {number}: {name}")
        except BaseException as error:
            fail(error)
            return
        # All that lives so far lives on: no collection need look at it, for 0.1 s each time.
        gc.collect()
        gc.freeze()
        engine.start()
        if service.status == "starting":
            service.status = "ready"
        host, port = listener.getsockname()[:2]
        _progress(f"listening on http://{f'[{host}]' if ':' in host else host}:{port}\n")

    async def run() -> None:
        nonlocal loop
        loop = asyncio.get_running_loop()
        starter.start()
        loop.add_signal_handler(signal.SIGHUP, lambda: reloads.append(loop.create_task(reload())))
        await server.serve(sockets=[listener])

    async def reload() -> None:
        try:
            is_newer = await service.reload()
            _progress("a newer checkpoint is served\n" if is_newer else "no newer checkpoint\n")
        except RequestError as error:
            _progress(f"{error.message}\n")
        except Exception:
            logging.exception("the newer checkpoint cannot be used")

    class _Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: Any) -> None:
            if service.status != "draining":
                service.status = "draining"
                stopper.start()
            super().handle_exit(sig, frame)

    starter = threading.Thread(target=start, daemon=True)
    app: ASGIApp = Gate(make_app(service), api_key, allow_origin, hosts)
    if allow_origin is not None:
        app = CORSMiddleware(
            app,
            [allow_origin],
            allow_methods=["*"],
            allow_headers=["*"],
            allow_private_network=True,  # a page elsewhere may use a server on this machine
        )
    config = uvicorn.Config(
        app,
        http=DeadlineProtocol,
        h11_max_incomplete_event_size=4 * MAX_HEADER_BYTES,
        proxy_headers=False,
        limit_concurrency=max_connections + 1,  # uvicorn refuses the last one
        log_level="error",  # or each request that is not HTTP would write a line
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(drain_timeout) + 5,
    )
    server = _Server(config)
    # uvicorn raises the signal again after a graceful end: that is no error here.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    failures: list[BaseException] = []
    reloads: list[asyncio.Task[None]] = []  # the loop itself keeps no task alive
    stopper = threading.Thread(target=engine.stop, args=(drain_timeout,), daemon=True)
    asyncio.run(run())
    starter.join()  # a process that ends while XLA compiles would crash
    if stopper.ident is not None:
        stopper.join()
    if failures:
        raise failures[0]


def _progress(line: str) -> None:
    shown = f"\r\x1b[K{line}" if sys.stderr.isatty() else f"{line.rstrip()}\n"
    print(shown, end="", file=sys.stderr, flush=True)
