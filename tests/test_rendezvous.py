"""How the processes of a run meet, and what each hears when they cannot."""

import concurrent.futures
import json
import socket
from contextlib import ExitStack

import pytest

from simplernn_jax.errors import UserError
from simplernn_jax.parallel.rendezvous import VERSIONS, Place, meet


@pytest.fixture
def address():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


def meet_all(places, timeout):
    """What `meet` returns or raises in each place, all at once."""
    with concurrent.futures.ThreadPoolExecutor(len(places)) as pool:
        futures = [pool.submit(meet, place, timeout) for place in places]
    return [future.exception() or future.result() for future in futures]


def test_all_know_each_other_and_are_connected_to_the_first(address):
    results = meet_all([Place(address, number, 3) for number in (2, 0, 1)], 20)
    with ExitStack() as stack:
        for _, connections in results:
            for connection in connections.values():
                stack.enter_context(connection)
        assert [[member.number for member in members] for members, _ in results] == [[0, 1, 2]] * 3
        assert [sorted(connections) for _, connections in results] == [[0], [1, 2], [0]]
        results[1][1][2].sendall(b"to 2")
        results[1][1][1].sendall(b"to 1")
        assert results[0][1][0].recv(9) == b"to 2"
        assert results[2][1][0].recv(9) == b"to 1"


def test_who_has_not_come_is_named_everywhere(address):
    results = meet_all([Place(address, number, 4) for number in (0, 2)], 1)
    message = f"2 of 4 processes have not come to {address} within 1 s: number 1, 3;"
    assert all(isinstance(result, UserError) and message in str(result) for result in results)


def test_an_address_where_nobody_listens(address):
    with pytest.raises(UserError, match=rf"process 0 cannot be reached at {address} for 1 s \(.*"):
        meet(Place(address, 1, 2), 1)


def test_a_port_that_is_taken(address):
    with (
        socket.create_server(("", int(address.split(":")[1]))),
        pytest.raises(UserError, match=r"process 0 cannot listen at port .* choose another port"),
    ):
        meet(Place(address, 0, 2), 1)


def test_another_program_at_that_address(address):
    with socket.create_server(("127.0.0.1", int(address.split(":")[1]))) as server:
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            future = pool.submit(meet, Place(address, 1, 2), 20)
            connection, _ = server.accept()
            with connection:
                connection.sendall(b"220 mail.example ESMTP\r\n")
        with pytest.raises(UserError, match=r"process 0 does not answer at .* another program"):
            future.result()


HELLO = {"number": 1, "count": 2, "versions": VERSIONS, "host": "b", "pid": 7}


@pytest.mark.parametrize(
    ("hellos", "message"),
    [
        ([HELLO | {"count": 3}], r"process 1 \(host b, pid 7\) was started as one of 3 processes"),
        ([HELLO | {"versions": "jax 0"}], f"has jax 0, process 0 {VERSIONS}: use the same"),
        ([HELLO | {"number": 0}], "have the same number: give each its own"),
    ],
)
def test_a_process_that_does_not_fit(address, hellos, message):
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        future = pool.submit(meet, Place(address, 0, 2), 20)
        replies = [say(address, hello) for hello in hellos]
    with pytest.raises(UserError, match=message) as caught:
        future.result()
    assert replies == [{"error": str(caught.value)}]


def say(address, hello):
    """What process 0 answers."""
    host, port = address.split(":")
    while True:
        try:
            connection = socket.create_connection((host, int(port)), 20)
            break
        except ConnectionRefusedError:
            continue
    with connection:
        connection.sendall(json.dumps(hello).encode() + b"\n")
        return json.loads(connection.makefile().readline())


def test_strangers_are_sent_away(address):
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        future = pool.submit(meet, Place(address, 0, 2), 20)
        with pytest.raises(json.JSONDecodeError):
            say(address, "GET / HTTP/1.1")
        assert [member["host"] for member in say(address, HELLO)["members"]][1:] == ["b"]
    _, connections = future.result()
    connections[1].close()
