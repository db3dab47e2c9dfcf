"""Start of a script's process, with scripts that need only the standard library."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from simplernn_jax.cli import process_start

ROOT = Path(__file__).resolve().parents[2]

SCRIPT = """
import bootstrap

if __name__ == "__main__":
    bootstrap.start()

import os
import sys

print(os.environ.get("GLIBC_TUNABLES"), sys.argv[1:])
print("error of the script", file=sys.stderr)
"""

with_huge_pages = pytest.mark.skipif(
    not process_start.has_huge_pages(), reason="needs glibc 2.35 or later"
)


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """A script that prints the settings of the allocator and its arguments."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "bootstrap.py", tmp_path / "scripts")
    (tmp_path / "simplernn_jax").symlink_to(ROOT / "simplernn_jax")
    path = tmp_path / "scripts" / "show.py"
    path.write_text(SCRIPT)
    return path


def run(*command: object, shell: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    usual = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    words = [sys.executable, *map(str, command)]
    return subprocess.run(
        ["bash", "-c", f'exec "$@" {shell}', "bash", *words],
        capture_output=True,
        text=True,
        check=False,
        env=usual | environment,
    )


@with_huge_pages
@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, "glibc.malloc.hugetlb=1"),
        (
            {"GLIBC_TUNABLES": "glibc.malloc.arena_max=2"},
            "glibc.malloc.arena_max=2:glibc.malloc.hugetlb=1",
        ),
        ({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}, "glibc.malloc.hugetlb=0"),
        ({process_start.HUGE_PAGES: "0"}, "None"),
    ],
)
def test_large_buffers_use_huge_pages(script, environment, expected):
    result = run("-X", "dev", "-u", script, "a b", "-c", **environment)
    assert result.stdout == f"{expected} ['a b', '-c']\n"


@pytest.mark.parametrize(
    "debugger", [["-m", "pdb", "-c", "continue"], ["-i"], ["-m", "trace", "-t"]]
)
def test_a_process_under_a_debugger_is_not_replaced(script, debugger):
    result = run(*debugger, script, shell="</dev/null")
    assert "None []" in result.stdout


@pytest.mark.parametrize(
    ("environment", "code", "output", "error"),
    [
        (None, 2, "", "has no absl; run `bash scripts/train.sh`"),
        ("printf '%s,' \"$@\"; exit 7", 7, "{script},a b,--x,", ""),
        (f'exec {sys.executable} -S "$@"', 2, "", "has no absl"),  # which is not tried again
    ],
)
def test_a_python_without_the_packages_is_replaced_by_the_environment_beside_the_script(
    script, environment, code, output, error
):
    if environment is not None:
        python = script.parents[2] / ".venv" / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(f"#!/bin/sh\n{environment}\n")
        python.chmod(0o755)
    result = run("-S", script, "a b", "--x")
    assert (result.returncode, result.stdout) == (code, output.format(script=script))
    assert error in result.stderr
    if code == 2:
        assert result.stderr.startswith("error: Python 3.")
        assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_become_empty_ones(script, closed):
    code = "import os; os.write(os.open('kept', os.O_CREAT | os.O_WRONLY), b'kept')"
    script.write_text(f"{SCRIPT}\nos.chdir(os.path.dirname(__file__))\n{code}\n")
    result = run(script, shell=closed)
    assert result.returncode == 0
    assert ("None" in result.stdout or "hugetlb" in result.stdout) == (closed == "2>&-")
    assert result.stderr == ("error of the script\n" if closed == ">&-" else "")
    assert (script.parent / "kept").read_text() == "kept"


STUBBORN = """
import bootstrap

if __name__ == "__main__":
    bootstrap.start(resumes={resumes})

import time

from simplernn_jax.cli import process_start

if {started}:
    process_start.run_starts()
print("ready", flush=True)
while True:
    try:
        time.sleep(30)
    except BaseException:
        pass
"""


@pytest.mark.parametrize(
    ("resumes", "started", "number", "code"),
    [
        (True, False, signal.SIGINT, 130),
        (True, False, signal.SIGTERM, 75),
        (True, True, signal.SIGINT, 75),
        (False, False, signal.SIGINT, 130),
        (False, False, signal.SIGTERM, 143),
    ],
)
def test_a_signal_ends_the_process_at_once(script, resumes, started, number, code):
    script.write_text(STUBBORN.format(resumes=resumes, started=started))
    process = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert errors.startswith(f"{number.name}: stopped")
    assert errors.count("\n") == 1
    assert ("the same command" in errors) == resumes


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_python_ends_does_not_change_the_exit_code(script, number):
    ending = (
        "import os, sys, threading\n"
        "threading.Thread(target=threading.Event().wait, daemon=True).start()\n"
        "class Last:\n"
        "    def __del__(self, kill=os.kill, process=os.getpid()):\n"
        f"        kill(process, {int(number)})\n"
        "last = Last()\n"
        "sys.exit(75)\n"
    )
    script.write_text(script.read_text() + ending)
    assert run(script).returncode == 75


@with_huge_pages
def test_a_signal_while_the_process_is_replaced_is_handled_afterwards(script):
    text = script.read_text().replace(
        "import bootstrap\n",
        "import bootstrap\nimport os, signal\n"
        "os.execv = lambda *a, execv=os.execv: (signal.raise_signal(signal.SIGINT), execv(*a))\n",
        1,
    )
    script.write_text(text.replace("print(", 'print("too late",', 1))
    result = run(script)
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "SIGINT: stopped\n")


def test_a_variable_that_jax_cannot_parse_is_one_line(script):
    result = run(script, JAX_ENABLE_X64="maybe")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        "error: JAX_ENABLE_X64=maybe: invalid truth value 'maybe' for environment "
        "'JAX_ENABLE_X64'; correct or unset it\n"
    )
