"""The wheel: its contents, and its commands where nothing else of the project is."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from email import message_from_string
from pathlib import Path

import pytest
from processes import ROOT

from simplernn_jax.__main__ import commands

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built by the backend of this environment: nothing is downloaded."""
    folder = tmp_path_factory.mktemp("wheel")
    build = ("wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", folder, ROOT)
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, build)]
    subprocess.run(command, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def names(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def files_of(folder, patterns):
    """Files of a folder of the checkout that git does not ignore."""
    found = [path for pattern in patterns for path in (ROOT / folder).rglob(pattern)]
    return {str(path.relative_to(ROOT)) for path in found if "__pycache__" not in path.parts}


def test_everything_is_inside_the_package(names):
    package = files_of("simplernn_jax", ["*.*"])
    beside = files_of("configs", ["*.py"]) | files_of("scripts", ["*.py"])
    beside -= {"scripts/benchmark.py", "scripts/stress.py"}
    expected = package | {f"simplernn_jax/{name}" for name in beside}
    assert {"simplernn_jax/ops/cpu/fused.c", "simplernn_jax/py.typed"} <= expected
    assert {name for name in names if ".dist-info/" not in name} == expected


def test_metadata(wheel, names):
    with zipfile.ZipFile(wheel) as archive:
        (info,) = {name.split("/")[0] for name in names if ".dist-info/" in name}
        metadata = message_from_string(archive.read(f"{info}/METADATA").decode())
        entry_points = archive.read(f"{info}/entry_points.txt").decode()
    assert entry_points.split("\n")[1] == "simplernn = simplernn_jax.__main__:main"
    assert f"{info}/licenses/LICENSE" in names
    assert set(metadata.get_all("Provides-Extra")) >= {"serve", "export", "cuda", "dev"}


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """An environment with the wheel; packages come from the one that runs the tests."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, symlinks=True)
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder)}))
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python")]
    subprocess.run(
        [*pip, "install", "--no-deps", "--no-index", "--quiet", str(wheel)],
        check=True,
        capture_output=True,
    )
    # A folder in a .pth file is searched, but the .pth files in it, such as that of an editable
    # installation of this project, are not read.
    (site / "packages.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    return folder / "bin"


def run(binaries, cwd, *arguments, **environment):
    """Run ``simplernn ARGUMENTS`` of the environment; return its output and errors."""
    usual = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(binaries / arguments[0]), *arguments[1:]],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env=usual | {"JAX_PLATFORMS": "cpu"} | environment,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


@pytest.mark.oldest_python
def test_train_and_sample_from_an_empty_folder(installed, tmp_path):
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog.\n" * 200)
    run_of = "--workdir=runs/tiny"
    sizes = ["--config.train.steps=3", "--config.data.source=text.txt"]
    sizes += ["--config.model.num_layers=1", "--config.data.validation_fraction=0"]
    log, _ = run(installed, tmp_path, "simplernn", "train", "--config", "tiny", run_of, *sizes)
    assert "simplernn sample --workdir" in log
    assert (tmp_path / "runs" / "tiny" / "report.html").is_file()
    text, _ = run(
        *(installed, tmp_path, "simplernn", "sample", run_of, "--prompt=The", "--max_new_tokens=5")
    )
    assert text.startswith("The")


@pytest.mark.oldest_python
def test_help_names_the_command(installed, tmp_path):
    shown, _ = run(installed, tmp_path, "python", "-m", "simplernn_jax", "--help")
    assert shown == run(installed, tmp_path, "simplernn")[0]
    described, _ = run(installed, tmp_path, "simplernn", "train", "--help")
    assert "simplernn train" in described
    assert "python scripts/" not in described
    assert [name for name, line in commands().items() if line not in shown] == ["benchmark"]


@pytest.mark.oldest_python
def test_configurations_are_found_by_name_and_nothing_is_beside_the_package(installed, tmp_path):
    code = """
import pathlib, sysconfig
from simplernn_jax import load_config
print(load_config("attention").model.mixer)
print(sorted(path.name for path in pathlib.Path(sysconfig.get_path("purelib")).iterdir()))
"""
    output, _ = run(installed, tmp_path, "python", "-c", code)
    expected = "['packages.pth', 'simplernn_jax', 'simplernn_jax-0.1.0.dist-info']"
    assert output.splitlines() == ["attention", expected]
