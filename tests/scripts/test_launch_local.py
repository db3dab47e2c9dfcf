"""scripts/launch_local.py with stand-ins for the processes that train."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from processes import start_python

import launch_local
from simplernn_jax.errors import UserError

STAND_IN = """
import json, os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
devices = [os.environ[name] for name in ("JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES")]
os.write(1, json.dumps([sys.argv[1:], *devices]).encode() + b"\\n")  # in one piece
time.sleep(30)
"""


def run(code):
    return subprocess.Popen([sys.executable, "-c", f"import os, signal, sys, time; {code}"])


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        (["sys.exit(75)", "sys.exit(75)"], 75),
        (["sys.exit(76)", "time.sleep(0.3); sys.exit(2)"], 2),
        (["os.kill(os.getpid(), signal.SIGKILL)", "time.sleep(0.3); sys.exit(76)"], 137),
        (["sys.exit(76)", "time.sleep(30)"], 76),
    ],
)
def test_the_exit_code_is_that_of_the_one_that_failed(monkeypatch, ends, expected):
    if any("30" in end for end in ends):
        monkeypatch.setattr(launch_local, "SHUTDOWN_TIMEOUT_SECONDS", 0.3)
    processes = [run(end) for end in ends]
    assert launch_local.wait(processes) == expected
    assert None not in [process.poll() for process in processes]


@pytest.fixture
def launch(tmp_path):
    """Start the launcher with stand-ins, and read the output of each."""
    shutil.copy(Path(launch_local.__file__), tmp_path)
    (tmp_path / "train.py").write_text(STAND_IN)
    launched = []

    def start(count):
        flags = ("--workdir=a b", "--config", "c")
        # As `simplernn launch_local` starts it: signals are blocked until the script handles them.
        command = [sys.executable, str(tmp_path / "launch_local.py"), str(count), *flags]
        blocked = "import os, signal; signal.pthread_sigmask(signal.SIG_BLOCK, (2, 15)); "
        launcher = start_python(
            "-c", f"{blocked}os.execv({sys.executable!r}, {command})", DEVICES_PER_PROCESS="4"
        )
        launched.append(launcher)
        return launcher, [json.loads(launcher.stdout.readline()) for _ in range(count)]

    yield start
    for launcher in launched:
        launcher.kill()
        launcher.communicate()


def test_starts_all_and_forwards_signals(launch):
    launcher, started = launch(3)
    launcher.send_signal(signal.SIGTERM)
    launcher.communicate(timeout=60)
    assert launcher.returncode == 75
    started.sort(key=lambda one: one[0][-1])
    (coordinator,) = {one[0][4] for one in started}
    assert coordinator.startswith("--coordinator=127.0.0.1:")
    for index, one in enumerate(started):
        place = [coordinator, "--num_processes=3", f"--process_id={index}"]
        assert one == [["--workdir=a b", "--config", "c", "--distributed", *place], "cpu", "4"]


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone has this signal")
def test_killing_the_launcher_kills_all(launch):
    launcher, started = launch(2)
    launcher.kill()
    assert launcher.communicate(timeout=20)[0] == ""  # nobody holds its stdout any more
    assert len(started) == 2


@pytest.mark.parametrize("arguments", [[], ["--config", "c"], ["65"]])
def test_a_wrong_number_of_processes_is_an_error(arguments):
    with pytest.raises(UserError, match="specify the number of processes, 1 to 64: bash scripts/"):
        launch_local.main(arguments)


@pytest.mark.parametrize("devices", ["0", "two"])
def test_a_wrong_number_of_devices_is_an_error(monkeypatch, devices):
    monkeypatch.setenv("DEVICES_PER_PROCESS", devices)
    with pytest.raises(UserError, match=f"DEVICES_PER_PROCESS='{devices}': specify 1 to"):
        launch_local.start(2, [])
