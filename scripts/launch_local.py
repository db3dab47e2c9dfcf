"""Starts several processes of scripts/train.py on this machine, and ends them together.

    bash scripts/launch_local.sh 2 --config configs/tiny.py --workdir runs/together

They run on the CPU, each with DEVICES_PER_PROCESS (1 if not set) devices. SIGTERM and SIGINT are
passed on to all. When one fails, the others end by themselves and say who it was; what is left
after a while is killed. The exit code is that of the one that failed.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

PATIENCE_SECONDS = 30.0
"""How long after the first failure the others may take to end."""

EXIT_INTERRUPTED, EXIT_PEER_LOST = 75, 76
"""As in `simplernn_jax.command_line` and `simplernn_jax.parallel.processes`."""

_SCRIPT = Path(__file__).resolve().parent / "train.py"


def main(arguments: list[str]) -> int:
    """Runs all processes to their end; the exit code of the whole."""
    if not arguments or not arguments[0].isdecimal() or arguments[0] == "0":
        print(
            "error: say how many processes: bash scripts/launch_local.sh 2 --config ...",
            file=sys.stderr,
        )
        return 2
    devices = os.environ.get("DEVICES_PER_PROCESS", "1")
    if not devices.isdecimal() or int(devices) == 0:
        print(
            f"error: DEVICES_PER_PROCESS={devices!r} is no number of devices; set it to 1 or more",
            file=sys.stderr,
        )
        return 2
    early: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: early.append(number))
    signal.signal(signal.SIGINT, lambda number, _: early.append(number))
    processes = start(int(arguments[0]), arguments[1:])

    def pass_on(number: int, frame: FrameType | None) -> None:
        for process in processes:
            process.send_signal(number)  # does nothing where it has ended

    signal.signal(signal.SIGTERM, pass_on)
    signal.signal(signal.SIGINT, pass_on)
    for number in early:
        pass_on(number, None)
    return wait(processes)


def start(count: int, arguments: list[str]) -> list[subprocess.Popen[bytes]]:
    """Starts `count` processes, which find each other at a free port."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": os.environ.get("DEVICES_PER_PROCESS", "1"),
    }
    return [
        subprocess.Popen(
            [
                *(sys.executable, str(_SCRIPT), *arguments, "--distributed"),
                *(f"--coordinator=127.0.0.1:{port}", f"--num_processes={count}"),
                f"--process_id={number}",
            ],
            env=environment,
            process_group=0,  # so that Ctrl-C reaches it once, through this process
        )
        for number in range(count)
    ]


def wait(processes: list[subprocess.Popen[bytes]]) -> int:
    """Waits until all have ended; the exit code of the first that failed by itself."""
    codes: list[int] = []
    running = list(processes)
    deadline = float("inf")
    while running:
        for process in list(running):
            if process.poll() is not None:
                running.remove(process)
                # As a shell gives it: 128 + number of the signal that killed it.
                codes.append(
                    process.returncode if process.returncode >= 0 else 128 - process.returncode
                )
                if codes[-1] not in (0, EXIT_INTERRUPTED):
                    deadline = min(deadline, time.monotonic() + PATIENCE_SECONDS)
        if time.monotonic() > deadline:
            for process in running:
                process.kill()
                process.wait()
            break
        time.sleep(0.05)
    own = [code for code in codes if code not in (0, EXIT_PEER_LOST)]
    return own[0] if own else max(codes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
