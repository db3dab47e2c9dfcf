"""HTTP below the routes: bodies with limits, streams, connections with deadlines, and access."""

import asyncio
import contextlib
import hmac
import re
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

import h11
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from simplernn_jax.serving.requests import RequestError, parse
from simplernn_jax.serving.responses import error_body, json_response
from simplernn_jax.serving.service import in_thread_if_long

MAX_BODY_BYTES = 1 << 24
BODY_SECONDS = 30.0
"""Seconds within which the body of a request must arrive."""
MAX_BODIES_BYTES = 1 << 26
"""Bytes of all bodies in use, except those of at most `SMALL_BODY_BYTES`."""
SMALL_BODY_BYTES = 1 << 14
"""Bytes of a body that always finds room."""
MAX_HEADER_BYTES = 1 << 15
HEADER_SECONDS = 10.0
"""Seconds within which the headers of a request must arrive, once a connection is open or its next
request has begun."""
OPEN_PATHS = frozenset({"/", "/page.js", "/tokens.js", "/page.css", "/health", "/openapi.json"})
"""Paths that need no key: they tell nothing about the model."""

Result = TypeVar("Result")
Body = TypeVar("Body")


@contextlib.asynccontextmanager
async def read_body(request: Request) -> AsyncIterator[bytes]:
    """Read the body, which counts toward `MAX_BODIES_BYTES` as long as the context lasts.

    Raises `RequestError`: 413 if it is too long, 408 if it does not arrive in time, 503 if others
    take all room.
    """
    parts, size, counted, state = [], 0, 0, request.app.state
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                parts.append(part)
                size += len(part)
                if size > MAX_BODY_BYTES:
                    raise RequestError(f"the body has over {MAX_BODY_BYTES:,} bytes", status=413)
                if size > SMALL_BODY_BYTES:
                    state.body_bytes += size - counted
                    counted = size
                    if state.body_bytes > MAX_BODIES_BYTES:
                        raise RequestError("other bodies take all room; try again", status=503)
    except TimeoutError as error:
        raise RequestError("the body did not arrive in time", status=408) from error
    else:
        content = b"".join(parts)
        parts.clear()  # or the context would hold the body twice
        yield content
    finally:
        state.body_bytes -= counted


@contextlib.asynccontextmanager
async def read_json(request: Request, kind: type[Body]) -> AsyncIterator[tuple[Body, int]]:
    """Read and `parse` a body as `read_body`, in a thread if it is long; give it and its size."""
    async with read_body(request) as content:
        yield await in_thread_if_long(len(content) // 16, parse, kind, content), len(content)


async def unless_disconnected(receive: Receive, result: Coroutine[Any, Any, Result]) -> Result:
    """Wait for `result`; cancel it and raise ClientDisconnect if the client disconnects before."""

    async def disconnected() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, gone = asyncio.ensure_future(result), asyncio.ensure_future(disconnected())
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


class EventStream(StreamingResponse):
    """A stream of server-sent events; the task group of its base class costs more than a block."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream until it ends or the client disconnects."""
        with contextlib.suppress(ClientDisconnect):
            await unless_disconnected(receive, self.stream_response(send))


class DeadlineProtocol(H11Protocol):
    """A connection that is closed if the headers of a request do not arrive in time.

    It answers no pipelined requests: it closes after the response before them.
    """

    _header_timer: asyncio.TimerHandle | None = None
    _is_last = False
    """True if the connection closes after the response under way."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the deadline of the first request."""
        super().connection_made(transport)
        self._expect_headers()

    def data_received(self, data: bytes) -> None:
        """Start the deadline of a next request with its first byte, and end it with its headers."""
        if self._is_last:
            return
        super().data_received(data)
        if self.conn.their_state is h11.DONE and self.conn.trailing_data[0]:
            # uvicorn would not read on, and so not see a client that goes away.
            self._is_last = True
            self.cycle.keep_alive = False
            self.flow.resume_reading()
        if self.cycle is None or self.cycle.response_complete:
            self._expect_headers()
        else:
            self._stop_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the deadline."""
        self._stop_timer()
        super().connection_lost(exc)

    def _expect_headers(self) -> None:
        if self._header_timer is None:
            self._header_timer = self.loop.call_later(HEADER_SECONDS, self.transport.close)

    def _stop_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None


def protect(
    app: ASGIApp, api_key: bytes | None, allow_origin: str | None, hosts: frozenset[str] | None
) -> ASGIApp:
    """Put `Gate` before an application, and CORS before both if `allow_origin` is given."""
    gate = Gate(app, api_key, allow_origin, hosts)
    if allow_origin is None:
        return gate
    return CORSMiddleware(
        gate,
        [allow_origin],
        allow_methods=["*"],
        allow_headers=["*"],
        allow_private_network=True,  # a page elsewhere may use a server on this machine
    )


class Gate:
    """ASGI middleware: bounds the headers, and checks host, origin and key.

    Args:
      app: what it protects.
      api_key: compared in constant time with the bearer token of each request; None admits all.
      allow_origin: origin of the pages of other servers that may use this one, or ``*``.
      hosts: names that the header Host must have one of, or a web page could reach a local server
        through its own name (DNS rebinding); None allows any.
    """

    def __init__(
        self,
        app: ASGIApp,
        api_key: bytes | None,
        allow_origin: str | None,
        hosts: frozenset[str] | None,
    ) -> None:
        self._app = app
        self._key = api_key
        self._origin = allow_origin
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or pass it on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        size = sum(len(name) + len(value) + 4 for name, value in scope["headers"])
        if size + len(scope["raw_path"]) + len(scope["query_string"]) > MAX_HEADER_BYTES:
            status, message = 431, f"the headers have over {MAX_HEADER_BYTES:,} bytes"
        elif reason := self._foreign_site(headers):
            status, message = 403, reason
        elif scope["path"] not in OPEN_PATHS and not self._is_admitted(headers):
            status, message = 401, "no valid API key: send it as 'Authorization: Bearer KEY'"
        else:
            await self._app(scope, receive, send)
            return
        # The body of the request has not been read.
        response = json_response(error_body(message, status), status, {"Connection": "close"})
        await response(scope, receive, send)

    def _foreign_site(self, headers: dict[bytes, bytes]) -> str | None:
        """Return why Host or Origin is rejected; pages of other origins need a key or the flag."""
        host = headers.get(b"host", b"").decode("latin-1")
        if self._hosts is not None and re.sub(r":\d*$", "", host) not in self._hosts:
            return f"Host {host!r} does not name this machine; start the server with --api_key_file"
        origin = headers.get(b"origin", b"").decode("latin-1")
        is_own = not origin or origin.partition("://")[2] == host
        if is_own or self._key is not None or self._origin in (origin, "*"):
            return None
        return f"a page of {origin!r} is not allowed; start the server with --allow_origin={origin}"

    def _is_admitted(self, headers: dict[bytes, bytes]) -> bool:
        if self._key is None:
            return True
        kind, _, key = headers.get(b"authorization", b"").partition(b" ")
        return hmac.compare_digest(key.strip(), self._key) and kind.lower() == b"bearer"
