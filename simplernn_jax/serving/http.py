"""Bodies of requests and responses over HTTP, with their limits and errors."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from typing import Any, TypeVar

import msgspec
from absl import logging
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from simplernn_jax.serving.answers import in_thread_if_long
from simplernn_jax.serving.requests import RequestError, parse
from simplernn_jax.serving.responses import error_body, excerpt
from simplernn_jax.serving.service import RETRY_AFTER_SECONDS, Service

MAX_BODY_BYTES = 1 << 24
BODY_SECONDS = 30.0
"""Seconds within which the body of a request must arrive."""
MAX_BODIES_BYTES = 1 << 26
"""Bytes of all bodies in use, except those of at most `SMALL_BODY_BYTES`."""
SMALL_BODY_BYTES = 1 << 14
"""Bytes of a body that always finds room."""

Result = TypeVar("Result")
Body = TypeVar("Body")
Handler = Callable[[Request], Awaitable[Response]]


def json_response(
    content: Any, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """Encode `content` as JSON."""
    return Response(msgspec.json.encode(content), status, headers, "application/json")


def error_response(error: RequestError) -> Response:
    """Make the response to a request that cannot be answered."""
    headers = {"Retry-After": str(RETRY_AFTER_SECONDS)} if error.status in (429, 503) else None
    body = error_body(error.message, error.status, error.param, error.code)
    return json_response(body, error.status, headers)


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


def counted(service: Service, handler: Handler) -> Handler:
    """Turn the errors of a handler into responses, and count them."""

    async def wrapped(request: Request) -> Response:
        try:
            response = await handler(request)
        except RequestError as error:
            response = error_response(error)
        except ClientDisconnect:
            response = Response(status_code=499)  # nobody reads it
        except Exception:
            logging.exception("%s %r failed", request.method, excerpt(request.scope["path"]))
            response = error_response(RequestError("the server failed", status=500))
        path = request.scope["route"].path
        service.metrics.requests.labels(path, str(response.status_code)).inc()
        return response

    return wrapped


async def http_exception(request: Request, error: Exception) -> Response:
    """Make the response to an unknown path or method."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.scope['path']}: {error.detail}"
    return json_response(error_body(message, error.status_code), error.status_code, error.headers)
