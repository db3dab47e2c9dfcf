"""The shell launchers, on a copy whose interpreter writes down what it was asked to run."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"

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
    ("given", "expected"),
    [
        ([], ["--workdir", "runs/base", "--config", "configs/base.py"]),
        (
            ["--config.train.steps=5"],
            ["--workdir", "runs/base", "--config", "configs/base.py", "--config.train.steps=5"],
        ),
        (["--config", "c/tiny.py"], ["--workdir", "runs/tiny", "--config", "c/tiny.py"]),
        (["--config=tiny.py", "--workdir=w"], ["--config=tiny.py", "--workdir=w"]),
        (["--workdir", "a b"], ["--config", "configs/base.py", "--workdir", "a b"]),
    ],
)
def test_train_fills_in_what_is_not_given(project, given, expected):
    assert arguments_of(launch(project, "train.sh", *given)) == ["scripts/train.py", *expected]


def test_train_from_another_folder_finds_the_project(project, tmp_path):
    arguments = arguments_of(launch(project, "train.sh", cwd=tmp_path))
    root = str(project)
    assert arguments[0] == f"{root}/scripts/train.py"
    assert arguments[1:] == [
        "--workdir",
        f"{root}/runs/base",
        "--config",
        f"{root}/configs/base.py",
    ]


def test_launch_local_hands_everything_on(project):
    arguments = arguments_of(launch(project, "launch_local.sh", "2", "--workdir", "a b"))
    assert arguments == ["scripts/launch_local.py", "2", "--workdir", "a b"]


@pytest.mark.parametrize("option", [["--python", "python3.99"], ["--python"]])
@pytest.mark.parametrize("name", ["train.sh", "infer.sh", "launch_local.sh"])
def test_another_python_is_checked(project, name, option):
    result = launch(project, name, *option)
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


def test_installs_once_and_again_when_the_project_asks_for_other_packages(project):
    assert "Installing" in launch(project, "train.sh").stderr
    assert launch(project, "train.sh").stderr == ""
    launch(project, "infer.sh", "x", "--workdir=w")
    assert installations(project) == 1
    (project / "pyproject.toml").write_text("[project]\ndependencies = ['rich']\n")
    launch(project, "train.sh")
    assert installations(project) == 2


def test_failed_installation_is_tried_again(project):
    failed = launch(project, "train.sh", PIP_EXIT="1")
    assert failed.returncode == 1
    assert failed.stdout == ""
    assert arguments_of(launch(project, "train.sh"))[0] == "scripts/train.py"
    assert installations(project) == 2


def trained(project: Path, name: str, modified: int) -> None:
    complete = project / "runs" / name / "checkpoints" / "complete.json"
    complete.parent.mkdir(parents=True)
    complete.write_text("{}")
    os.utime(complete, (modified, modified))


def test_infer_takes_the_run_saved_last(project):
    trained(project, "base", 100)
    trained(project, "tiny", 300)
    trained(project, "seed", 200)
    (project / "runs" / "unsaved").mkdir()
    result = launch(project, "infer.sh", "def main(", "--top_k=3")
    expected = ["scripts/sample.py", "--workdir", "runs/tiny", "--prompt=def main(", "--top_k=3"]
    assert arguments_of(result) == expected
    assert "model: runs/tiny" in result.stderr


def test_infer_without_a_prompt_leaves_it_to_the_script(project):
    trained(project, "base", 100)
    assert arguments_of(launch(project, "infer.sh")) == [
        "scripts/sample.py",
        "--workdir",
        "runs/base",
    ]


def test_infer_takes_the_run_it_is_given(project):
    arguments = arguments_of(launch(project, "infer.sh", "--workdir", "w", "--prompt", "--x"))
    assert arguments == ["scripts/sample.py", "--workdir", "w", "--prompt", "--x"]


@pytest.mark.parametrize(
    ("given", "prompt"),
    [(["- item"], "- item"), (["--- title"], "--- title"), (["--", "--seed"], "--seed")],
)
def test_infer_takes_a_prompt_that_begins_with_a_dash(project, given, prompt):
    arguments = arguments_of(launch(project, "infer.sh", *given, "--workdir=w"))
    assert arguments == ["scripts/sample.py", f"--prompt={prompt}", "--workdir=w"]


def test_infer_before_training_says_what_to_do(project):
    launch(project, "train.sh")
    result = launch(project, "infer.sh", "x")
    assert result.returncode == 2
    assert result.stderr == (
        "error: nothing under runs is trained yet; run: bash scripts/train.sh\n"
    )
