"""Start several processes of scripts/train.py on this machine, and terminate them together.

    bash scripts/launch_local.sh 2 --config configs/tiny.py --workdir runs/together

They run on the CPU, each with DEVICES_PER_PROCESS (1 if not set) devices, and connect over
loopback. The first SIGTERM or SIGINT makes all save and exit; a second one kills them, as does, on
Linux, the death of this process. When one fails, the others exit or are killed after a timeout. The
exit code comes from the one that failed.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import FrameType

from simplernn_jax.cli.command_line import exit_with
from simplernn_jax.devices import end_with_parent
from simplernn_jax.errors import EXIT_INTERRUPTED, EXIT_PEER_FAILURE, UserError
from simplernn_jax.parallel.supervisor import HEARTBEAT_SECONDS
from simplernn_jax.project import name_commands

SHUTDOWN_TIMEOUT_SECONDS = HEARTBEAT_SECONDS + 10.0
"""Timeout for the other processes to end after the first failure."""

MAX_PROCESSES = 64
MAX_DEVICES = 4096
"""Devices of one process."""

_SCRIPT = Path(__file__).resolve().parent / "train.py"


def main(arguments: list[str]) -> int:
    """Run all processes to their end; return the exit code of the whole."""
    if arguments[:1] in (["-h"], ["--help"]):
        print(name_commands(__doc__))
        return 0
    if not arguments or arguments[0] not in map(str, range(1, MAX_PROCESSES + 1)):
        raise UserError(
            f"specify the number of processes, 1 to {MAX_PROCESSES}: "
            "bash scripts/launch_local.sh 2 --config ..."
        )
    processes: list[subprocess.Popen[bytes]] = []
    received: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for process in processes:
            process.send_signal(signal.SIGTERM)  # does nothing where it has ended

    signals = (signal.SIGTERM, signal.SIGINT)
    for each in signals:
        signal.signal(each, forward)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)  # the command `simplernn` blocks them
    processes += start(int(arguments[0]), arguments[1:])
    if received:  # meanwhile
        forward(received[0], None)
    return wait(processes)


def start(count: int, arguments: list[str]) -> list[subprocess.Popen[bytes]]:
    """Start `count` processes, which connect at a free port."""
    devices = os.environ.get("DEVICES_PER_PROCESS", "1")
    if not devices.isdecimal() or not 1 <= int(devices) <= MAX_DEVICES:
        raise UserError(f"DEVICES_PER_PROCESS={devices!r}: specify 1 to {MAX_DEVICES} devices")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": devices}
    return [
        subprocess.Popen(
            [
                sys.executable,
                str(_SCRIPT),
                *arguments,
                "--distributed",
                f"--coordinator=127.0.0.1:{port}",
                f"--num_processes={count}",
                f"--process_id={number}",
            ],
            env=environment,
            process_group=0,  # so that Ctrl-C reaches it once, through this process
            preexec_fn=partial(end_with_parent, os.getpid()),  # noqa: PLW1509 - one thread
        )
        for number in range(count)
    ]


def wait(processes: list[subprocess.Popen[bytes]]) -> int:
    """Wait until all have ended; return the exit code of the first that failed by itself."""
    codes: list[int] = []
    running = list(processes)
    deadline = float("inf")
    while running:
        for process in list(running):
            if process.poll() is not None:
                running.remove(process)
                # As in a shell: 128 + number of the signal that killed it.
                codes.append(
                    process.returncode if process.returncode >= 0 else 128 - process.returncode
                )
                if codes[-1] not in (0, EXIT_INTERRUPTED):
                    deadline = min(deadline, time.monotonic() + SHUTDOWN_TIMEOUT_SECONDS)
        if time.monotonic() > deadline:
            for process in running:
                process.kill()
                process.wait()
            break
        time.sleep(0.05)
    own = [code for code in codes if code not in (0, EXIT_PEER_FAILURE)]
    return own[0] if own else max(codes)


if __name__ == "__main__":
    exit_with(lambda: main(sys.argv[1:]))
