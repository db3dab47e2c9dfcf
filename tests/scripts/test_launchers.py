"""The launchers: shell scripts in a project whose Python records its arguments; launch_local.py."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from processes import start_python

import launch_local
from simplernn_jax.errors import UserError

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"

RECORDING_PYTHON = f"""#!/usr/bin/env bash
case "$1" in
  -c | -VV) exec {sys.executable} "$@" ;;
  -m) echo "$3 $4" >>"$PIP_LOG"; exit "${{PIP_EXIT:-0}}" ;;
esac
echo "python: $0"
printf '%s\\n' "$@"
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    root = tmp_path / "a project"
    (root / "scripts").mkdir(parents=True)
    for name in ("environment.sh", "train.sh", "infer.sh", "launch_local.sh"):
        shutil.copy(SCRIPTS / name, root / "scripts" / name)
    (root / "pyproject.toml").write_text("[project]\n")
    (root / ".venv" / "bin").mkdir(parents=True)
    python = root / ".venv" / "bin" / "python"
    python.write_text(RECORDING_PYTHON)
    python.chmod(0o755)
    return root


def launch(
    project: Path, name: str, *arguments: str, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(project / "scripts" / name), *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd or project,
        env=os.environ | {"PIP_LOG": str(project / "pip.log")} | environment,
    )


def arguments_of(result: subprocess.CompletedProcess[str]) -> list[str]:
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()[1:]


def installations(project: Path) -> int:
    log = project / "pip.log"
    return len(log.read_text().splitlines()) if log.exists() else 0


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("train", [], ["--workdir", "runs/base", "--config", "configs/base.py"]),
        (
            "train",
            ["--config.train.steps=5"],
            ["--workdir", "runs/base", "--config", "configs/base.py", "--config.train.steps=5"],
        ),
        ("train", ["--config", "c/tiny.py"], ["--workdir", "runs/tiny", "--config", "c/tiny.py"]),
        ("train", ["--config=tiny.py", "--workdir=w"], ["--config=tiny.py", "--workdir=w"]),
        ("train", ["--workdir=runs/base"], ["--workdir=runs/base"]),  # a run
        ("launch_local", ["2", "--workdir", "a b"], ["2", "--workdir", "a b"]),
        ("infer", [], ["--workdir", "runs/base"]),
        ("infer", ["--workdir", "w", "--prompt", "--x"], ["--workdir", "w", "--prompt", "--x"]),
        ("infer", ["- item", "--workdir=w"], ["--prompt=- item", "--workdir=w"]),
        ("infer", ["--", "--seed", "--workdir=w"], ["--prompt=--seed", "--workdir=w"]),
    ],
)
def test_arguments_of_the_scripts(project, name, given, expected):
    trained(project, "base", 100)
    script = {"infer": "sample"}.get(name, name)
    arguments = arguments_of(launch(project, f"{name}.sh", *given))
    assert arguments == [f"scripts/{script}.py", *expected]


@pytest.mark.parametrize("option", [["--python", "python3.99"], ["--python"]])
def test_an_unsuitable_python_is_refused(project, option):
    result = launch(project, "train.sh", *option)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("place", ["before", "after"])
def test_another_python_has_an_environment_of_its_own(project, place):
    version = "{}.{}".format(*sys.version_info[:2])
    shutil.copytree(project / ".venv", project / f".venv-{version}")
    option = [f"--python={sys.executable}"]
    arguments = [*option, "2", "-c"] if place == "before" else ["2", "-c", *option]
    result = launch(project, "launch_local.sh", *arguments)
    assert f"/.venv-{version}/bin/python" in result.stdout.splitlines()[0]
    assert arguments_of(result) == ["scripts/launch_local.py", "2", "-c"]


def test_installs_once_and_again_when_the_dependencies_change(project):
    assert "Installing" in launch(project, "train.sh").stderr
    assert launch(project, "train.sh").stderr == ""
    launch(project, "infer.sh", "x", "--workdir=w")
    assert installations(project) == 1
    (project / "pyproject.toml").write_text("[project]\ndependencies = ['rich']\n")
    launch(project, "train.sh")
    assert installations(project) == 2


def trained(project: Path, name: str, modified: int) -> None:
    manifest = project / "runs" / name / "checkpoints" / "250" / "manifest.sha256"
    manifest.parent.mkdir(parents=True)
    manifest.touch()
    (project / "runs" / name / "config.json").touch()
    os.utime(manifest, (modified, modified))


def test_infer_uses_the_run_saved_last(project):
    trained(project, "base", 100)
    trained(project, "tiny", 300)
    trained(project, "seed", 200)
    (project / "runs" / "unsaved").mkdir()
    trained(project, "begun", 400)
    (project / "runs" / "begun" / "checkpoints" / "250" / "manifest.sha256").unlink()
    result = launch(project, "infer.sh", "def main(", "--top_k=3")
    expected = ["scripts/sample.py", "--workdir", "runs/tiny", "--prompt=def main(", "--top_k=3"]
    assert arguments_of(result) == expected
    assert "model: runs/tiny" in result.stderr


def test_infer_before_training_names_the_remedy(project):
    launch(project, "train.sh")
    result = launch(project, "infer.sh", "x")
    assert result.returncode == 2
    assert result.stderr == "error: no trained model under runs; run: bash scripts/train.sh\n"


STAND_IN = """
import json, os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
devices = [os.environ[name] for name in ("JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES")]
os.write(1, json.dumps([sys.argv[1:], *devices]).encode() + b"\\n")  # in one piece
time.sleep(30)
"""


def run_code(code):
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
    processes = [run_code(end) for end in ends]
    assert launch_local.wait(processes) == expected
    assert None not in [process.poll() for process in processes]


@pytest.fixture
def launch_all(tmp_path):
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


def test_starts_all_and_forwards_signals(launch_all):
    launcher, started = launch_all(3)
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
def test_killing_the_launcher_kills_all(launch_all):
    launcher, started = launch_all(2)
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
