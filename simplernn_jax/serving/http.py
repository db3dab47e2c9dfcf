"""HTTP below the routes: bodies, responses, and access."""

import asyncio
import contextlib
import hmac
import os
import re
from collections.abc import AsyncIterator, Coroutine, Mapping
from typing import Any, TypeVar

import msgspec
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from simplernn_jax.errors import UserError
from simplernn_jax.files import read_file
from simplernn_jax.serving.requests import RequestError

MAX_BODY_BYTES = 1 << 24
MAX_BODIES_BYTES = 1 << 26
"""Bytes of all bodies in use, except small ones."""
SMALL_BODY_BYTES = 1 << 14
"""Bytes of a body that always finds room."""
BODY_SECONDS = 30.0
"""Seconds within which the body of a request must arrive."""
OPEN_PATHS = frozenset({"/", "/page.js", "/server.js", "/page.css", "/health"})
"""Paths that need no key: they tell nothing about the model."""

LOOPBACK = ("127.0.0.1", "localhost", "::1")

_in_use: dict[Request, int] = {}
"""Bytes of each body in use that is not small."""

_T = TypeVar("_T")


@contextlib.asynccontextmanager
async def read_body(request: Request) -> AsyncIterator[bytes]:
    """Read the body, which counts toward `MAX_BODIES_BYTES` as long as the context lasts.

    Raises:
      RequestError: 413 if it is too long, 408 if it does not arrive in time, 503 if others take
        all room.
    """
    parts, size = [], 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                parts.append(part)
                size += len(part)
                if size > MAX_BODY_BYTES:
                    raise RequestError(f"the body has over {MAX_BODY_BYTES:,} bytes", status=413)
                if size > SMALL_BODY_BYTES:
                    _in_use[request] = size
                    if sum(_in_use.values()) > MAX_BODIES_BYTES:
                        raise RequestError("too many large requests; try again later", status=503)
    except TimeoutError as error:
        raise RequestError("the body did not arrive in time", status=408) from error
    else:
        content = b"".join(parts)
        parts.clear()  # or the context would hold the body twice
        yield content
    finally:
        _in_use.pop(request, None)


def json_response(
    content: Any, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """Encode `content` as JSON."""
    return Response(msgspec.json.encode(content), status, headers, "application/json")


def error_object(error: RequestError) -> Any:
    """Make OpenAI's error object."""
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    kind = {401: "authentication_error", 429: "rate_limit_error"}.get(error.status, kind)
    message = excerpt(error.message)
    return {"error": {"message": message, "type": kind, "param": error.param, "code": None}}


def error_response(error: RequestError, headers: Mapping[str, str] | None = None) -> Response:
    """Make the response of an error."""
    if error.status in (429, 503):
        headers = {"Retry-After": "1"}
    return json_response(error_object(error), error.status, headers)


def excerpt(text: str) -> str:
    """Shorten a text that a client may have chosen."""
    return text if len(text) <= 1000 else f"{text[:600]}…{text[-300:]}"


async def unless_disconnected(receive: Receive, result: Coroutine[Any, Any, _T]) -> _T:
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


def read_key(path: str | None) -> bytes | None:
    """Read the API key from a file or, without one, from the environment; None if it is not set."""
    where, key = "SIMPLERNN_JAX_API_KEY", os.environb.get(b"SIMPLERNN_JAX_API_KEY", b"").strip()
    if path is not None:
        where, key = path, read_file(path).strip()
    if not key and path is None:
        return None
    if not re.fullmatch(rb"[!-~]+", key):
        raise UserError(f"{where}: a key has printable ASCII characters only, and no spaces")
    return key


def protect(
    app: ASGIApp, api_key: bytes | None, allow_origin: str | None, only_local: bool
) -> ASGIApp:
    """Check host, origin and key of the requests to an application.

    Args:
      app: what is protected.
      api_key: compared in constant time with the bearer token of each request; None admits all.
      allow_origin: origin of the pages of other servers that may use this one (CORS), or ``*``.
      only_local: the header Host must name this machine, or a web page could reach a local server
        through its own name (DNS rebinding).
    """

    def rejection(path: str, headers: dict[bytes, bytes]) -> RequestError | None:
        host, origin = (headers.get(name, b"").decode("latin-1") for name in (b"host", b"origin"))
        if only_local and re.sub(r":\d*$", "", host).strip("[]") not in LOOPBACK:
            message = f"Host {host!r} does not name this machine; start the server with"
            return RequestError(f"{message} --api_key_file", status=403)
        is_own = not origin or origin.partition("://")[2] == host
        if not is_own and api_key is None and allow_origin not in (origin, "*"):
            message = f"a page of {origin!r} is not allowed; start the server with"
            return RequestError(f"{message} --allow_origin={origin}", status=403)
        kind, _, key = headers.get(b"authorization", b"").partition(b" ")
        if api_key is None or path in OPEN_PATHS:
            return None
        if kind.lower() == b"bearer" and hmac.compare_digest(key.strip(), api_key):
            return None
        message = "no valid API key: send it as 'Authorization: Bearer KEY'"
        return RequestError(message, status=401)

    async def gate(scope: Scope, receive: Receive, send: Send) -> None:
        error = None
        if scope["type"] == "http":
            error = rejection(scope["path"], dict(scope["headers"]))
        # The body of a request that is rejected has not been read.
        answer = app if error is None else error_response(error, {"Connection": "close"})
        await answer(scope, receive, send)

    if allow_origin is None:
        return gate
    return CORSMiddleware(
        gate,
        [allow_origin],
        allow_methods=["*"],
        allow_headers=["*"],
        allow_private_network=True,  # a page elsewhere may use a server on this machine
    )
