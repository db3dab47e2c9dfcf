"""HTTP connections with a deadline and bounds, and the checks that precede every request."""

import asyncio
import hmac
import re

import h11
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from simplernn_jax.serving.http import json_response
from simplernn_jax.serving.responses import error_body

MAX_HEADER_BYTES = 1 << 15
HEADER_SECONDS = 10.0
"""Seconds within which the headers of a request must arrive, once a connection is open or its next
request has begun."""
OPEN_PATHS = frozenset({"/", "/page.js", "/tokens.js", "/page.css", "/health", "/openapi.json"})
"""Paths that need no key: they tell nothing about the model."""


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


class Gate:
    """ASGI middleware: bounds the headers, and checks host, origin and key.

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
