"""Joining and leaving a run; tests/parallel/test_many_processes.py has training runs."""

import contextlib
import os
import signal
import socket
from unittest import mock

import jax
import pytest
from processes import free_address, start_python

from simplernn_jax.errors import UserError
from simplernn_jax.parallel import distributed

PEER_FAILURE = "error: a peer process failed"

MEMBER = """
import os, sys, time
from simplernn_jax.parallel import supervisor
supervisor.supervise()
supervisor.HEARTBEAT_SECONDS = 4
from simplernn_jax.parallel import distributed
from simplernn_jax.errors import UserError
from simplernn_jax.cli.command_line import exit_with

def fail():
    raise UserError("no text")

def main():
    coordinator, count, number, what = sys.argv[1:]
    with distributed.joined(coordinator, int(count), int(number), 60):
        print("joined", flush=True)
        if what == "process 1 fails" and number == "1":
            fail()
        if what == "coordinator fails":
            try:
                distributed.check_same(number, "has another text")
            except UserError as error:
                print(error, flush=True)
            distributed.run_on_coordinator_first(fail)
        while True:
            distributed.broadcast_from_coordinator(1)
            time.sleep(0.02)
exit_with(main, leave=os._exit)
"""


@pytest.fixture
def run():
    """Start Python programs, which are killed at the end of the test."""
    started = []

    def start(code, *arguments):
        process = start_python("-c", code, *arguments, process_group=0, JAX_NUM_CPU_DEVICES="1")
        started.append(process)
        return process

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def end(process):
    """Exit code, output and errors."""
    output, errors = process.communicate(timeout=100)
    return process.returncode, output, errors


@pytest.mark.parametrize(
    ("code", "expected", "line"),
    [
        ("os._exit(75)", 75, ""),
        ("os.kill(os.getpid(), 9)", 128 + 9, ""),
        ("supervisor.set_abort_reason(2, 'nobody came'); os.abort()", 2, "error: nobody came\n"),
        (
            "os.kill(os.getppid(), 15); time.sleep(30)",
            75,
            "SIGTERM: stopped; run the same command to start it\n",
        ),
    ],
)
def test_the_supervisor_ends_as_its_child(run, code, expected, line):
    prefix = "import os, signal, time; from simplernn_jax.parallel import supervisor; "
    process = run(f"{prefix}supervisor.supervise(); {code}")
    assert end(process) == (expected, "", line)


class Joining(Exception):
    pass


@pytest.fixture
def initialize(monkeypatch):
    """Arguments that `joined` passes to `jax.distributed.initialize`."""
    initialize = mock.Mock(side_effect=Joining)
    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    monkeypatch.setattr(distributed, "_discard_output_of_libraries", lambda: None)
    monkeypatch.delenv("JAX_COORDINATOR_BIND_ADDRESS", raising=False)
    handler = signal.getsignal(signal.SIGTERM)
    yield initialize.call_args_list
    signal.signal(signal.SIGTERM, handler)


@pytest.mark.parametrize(
    ("host", "number", "expected"),
    [
        ("127.0.0.1", 0, "127.0.0.1:PORT"),
        ("127.0.0.1", 1, None),
        ("192.0.2.7", 0, None),  # not of this machine: perhaps behind a proxy
        ("no-such-host.invalid", 0, None),
    ],
)
def test_process_0_listens_at_the_given_address(initialize, host, number, expected):
    address = f"{host}:{free_address().split(':')[1]}"
    with pytest.raises(Joining), distributed.joined(address, 2, number, 7):
        pass
    ((arguments, options),) = initialize
    assert arguments == (address, 2, number)
    port = address.rpartition(":")[2]
    assert options["coordinator_bind_address"] == (expected and expected.replace("PORT", port))
    assert options["cluster_detection_method"] == "deactivate"
    assert options["initialization_timeout"] == 7


def test_a_port_in_use(initialize):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        message = "--distributed: .*Address already in use.* Pass --coordinator HOST:PORT"
        with pytest.raises(UserError, match=message), distributed.joined(address, 2, 0, 7):
            pass


@pytest.mark.parametrize("coordinator", ["node1", "node1:99999"])
def test_an_invalid_address(initialize, coordinator):
    message = f"--coordinator={coordinator}: not HOST:PORT"
    with pytest.raises(UserError, match=message), distributed.joined(coordinator, 2, 0, 7):
        pass


def start_members(run, what, counts=(2, 2)):
    """Start two processes of one run, each given its own count."""
    address = free_address()
    return [run(MEMBER, address, count, number, what) for number, count in enumerate(counts)]


@pytest.mark.oldest_python
def test_an_error_of_one_and_an_error_of_all(run):
    one = start_members(run, "process 1 fails")
    all_ = start_members(run, "coordinator fails")
    others = start_members(run, "continue", counts=(2, 3))
    assert end(one[1]) == (2, "joined\n", "error: no text\n")
    code, _, errors = end(one[0])
    assert (code, PEER_FAILURE in errors) == (76, True)
    output = "joined\na process has another text\n"
    assert [end(member) for member in all_] == [(2, output, "error: no text\n"), (2, output, "")]
    code, output, errors = end(others[0])
    assert (code, output) == (2, "")
    assert errors.startswith("error: a process has different settings from process 0 (simplernn_")
    assert end(others[1]) == (2, "", "")
