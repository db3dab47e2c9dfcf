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
        (
            {},
            "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=268435456"
            ":glibc.malloc.trim_threshold=1073741824",
        ),
        ({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}, "glibc.malloc.hugetlb=0"),
        ({process_start.HUGE_PAGES: "0"}, "None"),
    ],
)
def test_large_buffers_use_huge_pages(script, environment, expected):
    result = run("-X", "dev", "-u", script, "a b", "-c", **environment)
    assert result.stdout == f"{expected} ['a b', '-c']\n"


def test_a_process_under_a_debugger_is_not_replaced(script):
    result = run("-m", "pdb", "-c", "continue", script, shell="</dev/null")
    assert "None []" in result.stdout


@pytest.mark.parametrize("has_environment", [False, True])
def test_a_python_without_the_packages_is_replaced_by_the_environment_beside_the_script(
    script, has_environment
):
    if has_environment:
        python = script.parents[1] / ".venv" / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text("#!/bin/sh\nprintf '%s,' \"$@\"; exit 7\n")
        python.chmod(0o755)
    result = run("-S", script, "a b", "--x")
    if has_environment:
        assert (result.returncode, result.stdout) == (7, f"{script},a b,--x,")
    else:
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr.startswith("error: Python 3.")
        assert "has no absl; run `bash scripts/train.sh`" in result.stderr
        assert result.stderr.count("\n") == 1


STUBBORN = """
import bootstrap

if __name__ == "__main__":
    bootstrap.start(resumes={resumes})

import time

print("ready", flush=True)
while True:
    try:
        time.sleep(30)
    except BaseException:
        pass
"""


@pytest.mark.parametrize(
    ("resumes", "number", "code"), [(True, signal.SIGINT, 75), (False, signal.SIGTERM, 143)]
)
def test_a_signal_ends_the_process_at_once(script, resumes, number, code):
    script.write_text(STUBBORN.format(resumes=resumes))
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
