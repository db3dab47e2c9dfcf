"""The shell launchers, in a copied project whose interpreter records its arguments."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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
