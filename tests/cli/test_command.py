"""The command simplernn, in a checkout."""

import re

import pytest
from processes import assert_refused, run_python

from simplernn_jax import __version__
from simplernn_jax.__main__ import commands

MODULE = ("-m", "simplernn_jax")


def test_without_arguments_and_help_list_the_commands():
    alone, shown = run_python(*MODULE), run_python(*MODULE, "--help")
    assert alone == shown
    assert (shown.code, shown.errors) == (0, "")
    listed = re.findall(r"^  (\w+)  +[A-Z].*\.$", shown.output, re.MULTILINE)
    assert listed == list(commands())
    assert "train" in listed


def test_version():
    assert run_python(*MODULE, "--version").output == f"{__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["trian"], "'trian': no such command; did you mean 'train'?; simplernn --help"),
        (["--workdir=x"], "'--workdir=x': no such command; simplernn --help lists them"),
    ],
)
def test_a_wrong_command_is_one_line(arguments, part):
    assert_refused(run_python(*MODULE, *arguments), part)


def test_nothing_slow_is_imported_before_the_command_is_known():
    code = "import sys; sys.argv[1:] = ['--help']; from simplernn_jax.__main__ import main; main()"
    result = run_python("-c", f"{code}; print(*sys.modules)")
    modules = result.output.splitlines()[-1].split()
    assert "simplernn_jax.__main__" in modules
    assert not {"jax", "flax", "absl", "numpy", "importlib.metadata"} & set(modules)


def test_help_and_errors_name_the_command():
    shown = run_python(*MODULE, "train", "--help")
    assert "simplernn train --config base --workdir runs/base" in shown.output
    assert "usage: simplernn train [--flag=value ...]" in shown.output
    assert "python scripts/" not in shown.output
    refused = run_python(*MODULE, "benchmark")
    assert_refused(refused, "error: name a benchmark: simplernn benchmark ops|")


def test_a_configuration_goes_by_its_name_from_any_folder(tmp_path):
    (tmp_path / "tiny").mkdir()  # a folder of that name is not in the way
    flags = ["--config=tiny", "--config.model.num_layers=0"]
    result = run_python(*MODULE, "train", *flags, "--workdir=w", cwd=tmp_path)
    assert "num_layers" in result.errors
