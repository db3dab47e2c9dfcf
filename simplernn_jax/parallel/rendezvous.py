"""The processes of a run meet before JAX starts: all are there, or one line says who is not.

JAX's own start ends a process that waits in vain from within C++, without a word about who is
missing. So the processes first meet at the coordinator's address on plain sockets, which stay open
afterwards: `peers` sees on them who dies.
"""

import contextlib
import dataclasses
import json
import os
import socket
import time
from typing import Any

import jax

from simplernn_jax import __version__
from simplernn_jax.errors import UserError

VERSIONS = f"simplernn_jax {__version__}, jax {jax.__version__}"

_RETRY_SECONDS = 0.2
_HELLO_SECONDS = 5.0
"""How long process 0 listens to a stranger that says nothing."""


@dataclasses.dataclass(frozen=True)
class Member:
    """A process of the run."""

    number: int
    host: str
    pid: int

    def __str__(self) -> str:
        return f"process {self.number} (host {self.host}, pid {self.pid})"


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the processes meet, and which of how many this one is."""

    coordinator: str
    """``HOST:PORT``; process 0 listens at the port, the others find it at the host."""
    number: int
    count: int

    @property
    def host(self) -> str:
        """The host alone."""
        return self.coordinator.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """The port alone."""
        return int(self.coordinator.rpartition(":")[2])


def meet(place: Place, timeout: float) -> tuple[list[Member], dict[int, socket.socket]]:
    """Waits until all processes are there.

    Args:
      place: where, and who this process is.
      timeout: seconds.

    Returns:
      All members by number, and open connections by number: process 0 has one to every other,
      the others have one to process 0.

    Raises:
      UserError: the port is taken, process 0 cannot be reached, a process is missing after
        `timeout` seconds, or one was started otherwise than the others.
    """
    if place.number == 0:
        return _receive(place, timeout)
    return _visit(place, timeout)


def _receive(place: Place, timeout: float) -> tuple[list[Member], dict[int, socket.socket]]:
    deadline = time.monotonic() + timeout
    members = {0: Member(0, socket.gethostname(), os.getpid())}
    connections: dict[int, socket.socket] = {}
    waiting: list[socket.socket] = []
    try:
        with _listen(place) as server:
            while len(members) < place.count:
                server.settimeout(max(deadline - time.monotonic(), 0.01))
                try:
                    connection, _ = server.accept()
                except TimeoutError:
                    raise UserError(_missing(place, members, timeout)) from None
                hello = _read(connection, _HELLO_SECONDS)
                if hello is None or "number" not in hello:
                    connection.close()  # a health check or a port scan
                    continue
                newcomer = Member(hello["number"], hello["host"], hello["pid"])
                waiting.append(connection)
                _check_fits(place, members, newcomer, hello)
                members[newcomer.number] = newcomer
                connections[newcomer.number] = connection
    except UserError as error:
        for connection in waiting:
            with connection:
                _write(connection, {"error": str(error)})
        raise
    present = [members[number] for number in range(place.count)]
    everybody = {"members": [dataclasses.asdict(member) for member in present]}
    for connection in connections.values():
        _write(connection, everybody)
    return present, connections


def _visit(place: Place, timeout: float) -> tuple[list[Member], dict[int, socket.socket]]:
    deadline = time.monotonic() + timeout
    hello = {
        "number": place.number,
        "count": place.count,
        "versions": VERSIONS,
        "host": socket.gethostname(),
        "pid": os.getpid(),
    }
    while True:
        left = deadline - time.monotonic()
        try:
            connection = socket.create_connection((place.host, place.port), max(left, 0.01))
            break
        except OSError as error:  # not started yet, or its name is not known yet
            if left <= _RETRY_SECONDS:
                raise UserError(
                    f"process 0 cannot be reached at {place.coordinator} for {timeout:.0f} s "
                    f"({error.strerror or error}): is it running, and is the address right?"
                ) from error
            time.sleep(_RETRY_SECONDS)
    _write(connection, hello)
    # Process 0 waits no longer than this from now on, and says how it ended.
    reply = _read(connection, timeout + _HELLO_SECONDS) or {}
    if "members" in reply:
        return [Member(**member) for member in reply["members"]], {0: connection}
    connection.close()
    raise UserError(
        reply.get("error")
        or f"process 0 does not answer at {place.coordinator}: it has ended or hangs, or another "
        "program listens there: see its output, or choose another port"
    )


def _listen(place: Place) -> socket.socket:
    """Listens on all interfaces, as JAX does afterwards at the same port."""
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(
                ("", place.port), family=socket.AF_INET6, dualstack_ipv6=True
            )
        return socket.create_server(("", place.port))
    except OSError as error:
        raise UserError(
            f"process 0 cannot listen at port {place.port} of this host "
            f"({error.strerror or error}): choose another port for all processes"
        ) from error


def _check_fits(
    place: Place, members: dict[int, Member], newcomer: Member, hello: dict[str, Any]
) -> None:
    if hello["versions"] != VERSIONS:
        raise UserError(f"{newcomer} has {hello['versions']}, process 0 {VERSIONS}: use the same")
    if hello["count"] != place.count:
        raise UserError(
            f"{newcomer} was started as one of {hello['count']} processes, process 0 as one of "
            f"{place.count}: give all the same number"
        )
    if newcomer.number in members:
        raise UserError(
            f"{newcomer} and {members[newcomer.number]} have the same number: give each its own"
        )


def _missing(place: Place, members: dict[int, Member], timeout: float) -> str:
    missing = [number for number in range(place.count) if number not in members]
    names = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
    return (
        f"{len(missing)} of {place.count} processes have not come to {place.coordinator} within "
        f"{timeout:.0f} s: number {names}; see their output, then start all again"
    )


def _write(connection: socket.socket, message: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # gone: that shows when it is read from
        connection.sendall(json.dumps(message).encode() + b"\n")


def _read(connection: socket.socket, seconds: float) -> dict[str, Any] | None:
    """The next line as JSON, byte by byte so that nothing after it is lost; None if none came."""
    deadline = time.monotonic() + seconds
    line = b""
    try:
        while not line.endswith(b"\n"):
            connection.settimeout(max(deadline - time.monotonic(), 0.01))
            byte = connection.recv(1)
            if not byte:
                return None
            line += byte
        message = json.loads(line)
    except (OSError, ValueError):
        return None
    return message if isinstance(message, dict) else None
