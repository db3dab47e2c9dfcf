"""Bodies of requests and responses over HTTP, with their limits and errors."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec
from absl import logging
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from simplernn_jax.serving.requests import RequestError
from simplernn_jax.serving.responses import error_body
from simplernn_jax.serving.service import RETRY_AFTER_SECONDS, Service

MAX_BODY_BYTES = 1 << 24
BODY_SECONDS = 30.0
"""Seconds within which the body of a request must arrive."""

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


async def read_body(request: Request) -> bytes:
    """Read the body of a request.

    Raises:
      RequestError: 413 if it is too long, 408 if it does not arrive.
    """
    parts, size = [], 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                size += len(part)
                if size > MAX_BODY_BYTES:
                    raise RequestError(f"the body has over {MAX_BODY_BYTES:,} bytes", status=413)
                parts.append(part)
    except TimeoutError as error:
        raise RequestError("the body did not arrive in time", status=408) from error
    return b"".join(parts)


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
            logging.exception("%s %s failed", request.method, request.url.path)
            response = error_response(RequestError("the server failed", status=500))
        path = request.scope["route"].path
        service.metrics.requests.labels(path, str(response.status_code)).inc()
        return response

    return wrapped


async def http_exception(request: Request, error: Exception) -> Response:
    """Make the response to an unknown path or method."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    return json_response(error_body(message, error.status_code), error.status_code, error.headers)
