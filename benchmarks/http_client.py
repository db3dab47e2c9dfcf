"""A client of the server under measurement that costs little: it shares the server's cores."""

import asyncio
import contextlib
import json
import time
import urllib.parse
from collections.abc import AsyncIterator
from typing import Any, NamedTuple


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
        self.send("POST", path, fields)
        answer, first = bytearray(), 0.0
        while not answer.endswith(b"0\r\n\r\n"):
            part = await self.reader.read(1 << 16)
            answer += part
            if not part or not answer.startswith(b"HTTP/1.1 200 "):
                raise ConnectionError(f"the stream ended: {bytes(answer)!r}")
            if not first and b"data: {" in part:
                first = time.perf_counter()
        return bytes(answer), first, time.perf_counter()

    def send(self, method: str, path: str, fields: Any, connection: str = "keep-alive") -> None:
        """Send a request with `fields` as JSON, if there are any."""
        body = b"" if fields is None else json.dumps(fields).encode()
        head = f"{method} {path} HTTP/1.1\r\nHost: {self.host}\r\nConnection: {connection}\r\n"
        self.writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)


@contextlib.asynccontextmanager
async def connected(url: str) -> AsyncIterator[Connection]:
    """Open a connection, and close it at the end."""
    address = urllib.parse.urlsplit(url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    try:
        yield Connection(reader, writer, address.netloc)
    finally:
        writer.close()


async def fetch(url: str, method: str, path: str, fields: Any = None) -> tuple[int, bytes]:
    """Status and body of a response, over a new connection."""
    async with connected(url) as connection:
        connection.send(method, path, fields, "close")
        head, _, body = (await connection.reader.read()).partition(b"\r\n\r\n")
    return int(head.split()[1]), body
