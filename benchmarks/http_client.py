"""A client of the server under measurement that costs little: it shares the server's cores."""

import asyncio
import contextlib
import json
import time
import urllib.parse
from collections.abc import AsyncIterator
from typing import Any

_END = b"0\r\n\r\n"
"""End of a body in chunks."""


class Connection(asyncio.Protocol):
    """A keep-alive connection that carries one stream after another."""

    def __init__(self, host: str) -> None:
        self._host = host

    def connection_made(self, transport: Any) -> None:
        """Keep the transport."""
        self.transport = transport
        self._begin()

    def _begin(self) -> None:
        self._parts: list[bytes] = []
        self._times: list[float] = []
        self._tail = b""
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def data_received(self, data: bytes) -> None:
        """Keep a part of a stream, with its time."""
        self._times.append(time.perf_counter())
        self._parts.append(data)
        self._tail = (self._tail + data)[-len(_END) :]
        if not self._parts[0].startswith(b"HTTP/1.1 200 "):
            self.transport.close()
        elif self._tail == _END:
            self._ended.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail a stream that has not ended."""
        if not self._ended.done():
            error = ConnectionError(f"{exc}, after {b''.join(self._parts)!r}")
            self._ended.set_exception(error)
            self._ended.exception()  # or asyncio reports it where nobody awaits a stream

    async def stream(self, path: str, fields: Any) -> tuple[list[bytes], list[float]]:
        """POST `fields`; return the parts of a response in chunks, and the seconds of each.

        Raises:
          ConnectionError: the status is not 200, or the connection ended before the stream.
        """
        if self.transport.is_closing():
            raise ConnectionError("the connection has ended")
        self._begin()
        self.transport.write(_request(self._host, path, fields, "POST", "keep-alive"))
        await self._ended
        return self._parts, self._times


@contextlib.asynccontextmanager
async def connected(url: str) -> AsyncIterator[Connection]:
    """Open a connection, and close it at the end."""
    address = urllib.parse.urlsplit(url)
    loop = asyncio.get_running_loop()
    where = address.hostname or "", address.port or 80
    transport, connection = await loop.create_connection(lambda: Connection(address.netloc), *where)
    try:
        yield connection
    finally:
        transport.close()


async def status_of(url: str, path: str, fields: Any) -> int:
    """Status of a response, which is read to its end."""
    parts = [part async for part in parts_of(url, path, fields)]
    return int(b"".join(parts).split()[1])


async def body_of(url: str, path: str) -> bytes:
    """Body of ``GET path``, one line of JSON."""
    return b"".join([part async for part in parts_of(url, path)]).split(b"\r\n\r\n")[-1]


async def parts_of(
    url: str, path: str, fields: Any = None, method: str | None = None
) -> AsyncIterator[bytes]:
    """Yield a response as it arrives, over a connection of its own.

    Without a `method`, it is POST with `fields`, which are sent as JSON, and GET without.
    """
    address = urllib.parse.urlsplit(url)
    method = method or ("GET" if fields is None else "POST")
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    try:
        writer.write(_request(address.netloc, path, fields, method, "close"))
        while part := await reader.read(1 << 16):
            yield part
    finally:
        writer.close()


def _request(host: str, path: str, fields: Any, method: str, connection: str) -> bytes:
    body = b"" if fields is None else json.dumps(fields).encode()
    head = f"{method} {path} HTTP/1.1\r\nHost: {host}\r\nConnection: {connection}\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
