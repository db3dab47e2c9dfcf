"""A client of the server under measurement that costs little: it shares the server's cores."""

import asyncio
import contextlib
import json
import time
import urllib.parse
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

_END = b"0\r\n\r\n"
"""End of a body in chunks."""


class Connection(NamedTuple):
    """A keep-alive connection that carries one stream after another."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    host: str

    async def stream(self, path: str, fields: Any) -> tuple[bytes, float, float]:
        """POST `fields`; return a response in chunks, and when its first event and its end came.

        Raises:
          ConnectionError: the status is not 200, or the connection ended before the stream.
        """
        self.writer.write(_request(self.host, path, fields, "POST", "keep-alive"))
        answer, first = bytearray(), 0.0
        while not answer.endswith(_END):
            part = await self.reader.read(1 << 16)
            answer += part
            if not part or not answer.startswith(b"HTTP/1.1 200 "):
                raise ConnectionError(f"the stream ended: {bytes(answer)!r}")
            if not first and b"data: {" in part:
                first = time.perf_counter()
        return bytes(answer), first, time.perf_counter()


@contextlib.asynccontextmanager
async def connected(url: str) -> AsyncIterator[Connection]:
    """Open a connection, and close it at the end."""
    address = urllib.parse.urlsplit(url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    try:
        yield Connection(reader, writer, address.netloc)
    finally:
        writer.close()


async def fetch(
    url: str, path: str, fields: Any = None, method: str | None = None
) -> tuple[int, bytes]:
    """Status and body of a response, over a connection of its own.

    Without a `method`, it is POST with `fields`, which are sent as JSON, and GET without.
    """
    method = method or ("GET" if fields is None else "POST")
    async with connected(url) as connection:
        connection.writer.write(_request(connection.host, path, fields, method, "close"))
        head, _, body = (await connection.reader.read()).partition(b"\r\n\r\n")
    return int(head.split()[1]), body


def _request(host: str, path: str, fields: Any, method: str, connection: str) -> bytes:
    body = b"" if fields is None else json.dumps(fields).encode()
    head = f"{method} {path} HTTP/1.1\r\nHost: {host}\r\nConnection: {connection}\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
