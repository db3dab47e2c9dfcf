"""HTTP connections with a deadline and bounds, and the checks that precede every request."""

import asyncio
import hmac
import re
from typing import Any

import msgspec
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from simplernn_jax.serving.responses import error_body

MAX_HEADER_BYTES = 1 << 15
MAX_UNPARSED_BYTES = 4 * MAX_HEADER_BYTES
"""Of headers that are still to end: with more, a connection ends without an answer in JSON."""
HEADER_SECONDS = 10.0
"""Seconds within which the headers of a request must arrive, once a connection is open or its next
request has begun."""
OPEN_PATHS = frozenset({"/", "/page.js", "/tokens.js", "/page.css", "/health", "/openapi.json"})
"""Paths that need no key: they tell nothing about the model."""


class BoundedProtocol(HttpToolsProtocol):
    """A connection that ends if the headers of a request are too long or do not arrive in time."""

    _header_timer: asyncio.TimerHandle | None = None
    _header_bytes: int | None = 0
    """Bytes received of headers that are not complete; None if none are expected."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the deadline of the first request."""
        super().connection_made(transport)
        self._expect_headers()

    def data_received(self, data: bytes) -> None:
        """Start the deadline of a next request with its first byte, and end it with its headers."""
        before = self._header_bytes
        super().data_received(data)
        if before is not None and self._header_bytes is not None:
            self._header_bytes = before + len(data)
            if self._header_bytes > MAX_UNPARSED_BYTES:
                self.send_400_response("Headers too long.")
        if self.cycle is None or self.cycle.response_complete:
            self._expect_headers()
        else:
            self._stop_timer()

    def on_message_begin(self) -> None:
        """Count the bytes of the headers."""
        super().on_message_begin()
        self._header_bytes = 0

    def on_headers_complete(self) -> None:
        """End the count."""
        super().on_headers_complete()
        self._header_bytes = None

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


class Gate:
    """ASGI middleware: bounds the headers, checks the key, and allows one origin.

    Args:
      app: what it protects.
      api_key: compared in constant time with the bearer token of each request; None admits all.
      allow_origin: origin of the pages of other servers that may use this one, or ``*``.
      hosts: names that the header Host must have one of, or a web page could reach a local server
        through a name of its own (DNS rebinding); None allows any.
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
        if self._origin is not None:
            send = self._with_origin(send)
        headers = dict(scope["headers"])
        size = sum(len(name) + len(value) + 4 for name, value in scope["headers"])
        if size + len(scope["raw_path"]) + len(scope["query_string"]) > MAX_HEADER_BYTES:
            await _refuse(send, 431, f"the headers have over {MAX_HEADER_BYTES:,} bytes")
        elif not self._is_known_site(headers):
            await _refuse(send, 403, "a request for another host, or from a page of another one")
        elif scope["method"] == "OPTIONS" and self._origin is not None:
            await _answer(send, 204, b"")
        elif scope["path"] not in OPEN_PATHS and not self._is_admitted(headers):
            await _refuse(send, 401, "no valid API key: send it as 'Authorization: Bearer KEY'")
        else:
            await self._app(scope, receive, send)

    def _is_known_site(self, headers: dict[bytes, bytes]) -> bool:
        """Check Host, and that pages of other origins have a key or are allowed."""
        host = headers.get(b"host", b"").decode("latin-1")
        if self._hosts is not None and re.sub(r":\d*$", "", host) not in self._hosts:
            return False
        origin = headers.get(b"origin", b"").decode("latin-1")
        is_own = not origin or origin.partition("://")[2] == host
        return is_own or self._key is not None or self._origin in (origin, "*")

    def _is_admitted(self, headers: dict[bytes, bytes]) -> bool:
        if self._key is None:
            return True
        kind, _, key = headers.get(b"authorization", b"").partition(b" ")
        return hmac.compare_digest(key.strip(), self._key) and kind.lower() == b"bearer"

    def _with_origin(self, send: Send) -> Send:
        async def wrapped(message: Any) -> None:
            if message["type"] == "http.response.start":
                assert self._origin is not None
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"access-control-allow-origin", self._origin.encode("latin-1")),
                    (b"access-control-allow-headers", b"authorization, content-type"),
                    (b"access-control-allow-methods", b"GET, POST, PUT, DELETE"),
                    (b"vary", b"Origin"),
                ]
            await send(message)

        return wrapped


async def _refuse(send: Send, status: int, message: str) -> None:
    await _answer(send, status, msgspec.json.encode(error_body(message, status)))


async def _answer(send: Send, status: int, body: bytes) -> None:
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),  # the body of the request has not been read
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
